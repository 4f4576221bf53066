"""Every kind of input that the product reads. A new reader is one more `Input` in one of these tables."""

from __future__ import annotations

from . import inputs_run, inputs_search, inputs_sensors, inputs_tables, inputs_uris, inputs_weights

INPUTS = (
    *inputs_tables.INPUTS,
    *inputs_sensors.INPUTS,
    *inputs_weights.INPUTS,
    *inputs_run.INPUTS,
    *inputs_search.INPUTS,
    *inputs_uris.INPUTS,
)
