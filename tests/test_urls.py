"""What is printed of a URL never holds a secret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.urls import redact_url


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a.pt", "runs/a.pt"),
        ("s3://bucket/a@b.pt", "s3://bucket/a@b.pt"),
        ("s3://bucket/a#b.pt", "s3://bucket/a#b.pt"),
        ("s3://KEY:SECRET@bucket/a.pt", "s3://bucket/a.pt"),
        ("s3://KEY:SE/CR/ET@bucket/a.pt", "s3://bucket/a.pt"),
        ("s3://KEY:/SE/CRET@bucket/a.pt", "s3://bucket/a.pt"),
        ("s3://KEY:12/CRET@bucket/a.pt", "s3://bucket/a.pt"),
        ("HTTPS://user:word@host/a.pt#part", "HTTPS://host/a.pt"),
        ("http://host:8080/a@b.pt", "http://host:8080/a@b.pt"),
        ("s3://bucket/a?endpoint_override=127.0.0.1:9000&secret_key=x", "s3://bucket/a"),
        ("https://host:8443/a.pt?X-Amz-Signature=abc#part", "https://host:8443/a.pt"),
        ("https://user:word@host:8443/a@b.pt", "https://host:8443/a@b.pt"),
        ("postgresql://me:word@db:5432/mlflow", "postgresql://db:5432/mlflow"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("http://h/x?t=1: HTTP 403, not http://u:p@h/y.", "http://h/x: HTTP 403, not http://h/y."),
        ("'s3://K:S@b/k?z=1' cannot be read", "'s3://b/k' cannot be read"),
    ],
)
def test_a_url_loses_user_password_and_query_and_nothing_else(text: str, expected: str) -> None:
    assert redact_url(text) == expected


_SECRET = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="/+=-"), min_size=6)


@given(_SECRET)
def test_no_secret_key_of_a_store_survives_whatever_it_begins_with(secret: str) -> None:
    assert redact_url(f"s3://KEY:{secret}@bucket/path") == "s3://bucket/path"


@given(_SECRET, st.sampled_from(["s3", "https", "gs", "mysql+pymysql"]))
def test_no_secret_survives_in_user_or_query(secret: str, scheme: str) -> None:
    secret = f"Zq{secret}qZ"
    for url in (f"{scheme}://KEY:{secret}@host/path", f"{scheme}://host/path?token={secret}"):
        assert secret not in redact_url(f"{url}: refused")
        assert redact_url(url) == f"{scheme}://host/path"
