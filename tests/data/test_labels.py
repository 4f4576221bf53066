"""Label tables, against the lists that the benchmarks publish."""

from __future__ import annotations

import numpy as np
import pytest
from nuscenes.eval.lidarseg.utils import LidarsegClassMapper

from slidr.data.labels import CLASS_OF_RAW, CLASSES, classes_of, semantic_kitti_raw
from slidr.data.storage import DataError
from slidr.data.synthetic.names import CATEGORIES


def test_nuscenes_classes_are_those_of_the_devkit() -> None:
    mapper = object.__new__(LidarsegClassMapper)  # its tables need no data set
    mapper.ignore_class = {"name": "ignored", "index": 0}
    fine_to_coarse, coarse_to_index = mapper.get_fine2coarse(), mapper.get_coarse2idx()
    raw_of_name = {name: index for index, name in enumerate(CATEGORIES)}
    assert len(fine_to_coarse) == len(CLASS_OF_RAW["nuscenes"]) == 32
    for name, coarse in fine_to_coarse.items():
        assert CLASS_OF_RAW["nuscenes"][raw_of_name[name]] == coarse_to_index.get(coarse, 0), name


def test_every_class_has_a_name_and_a_raw_label() -> None:
    for dataset, names in CLASSES.items():
        assert set(CLASS_OF_RAW[dataset]) - {-1} == set(range(len(names)))
    assert (len(CLASSES["nuscenes"]), len(CLASSES["semantic_kitti"])) == (17, 20)


def test_semantic_kitti_labels_carry_instances_in_their_high_bits() -> None:
    raw = np.array([10, 252, 259, 81, 99, 40 | (7 << 16)], np.uint32)
    assert classes_of(raw, "semantic_kitti").tolist() == [1, 1, 5, 19, 0, 9]


def test_semantic_kitti_classes_survive_the_way_out_and_back() -> None:
    raw = semantic_kitti_raw(np.arange(20))
    assert raw.tolist() == [0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]
    assert classes_of(raw, "semantic_kitti").tolist() == list(range(20))


def test_raw_labels_outside_the_map_are_listed() -> None:
    with pytest.raises(DataError, match=r"x\.label: raw labels .* 7 \(2 points\), 300 \(1 points\)"):
        classes_of(np.array([7, 10, 300, 7], np.uint32), "semantic_kitti", "x.label")
    with pytest.raises(DataError, match=r"32 \(1 points\)"):
        classes_of(np.array([31, 32], np.uint8), "nuscenes")
