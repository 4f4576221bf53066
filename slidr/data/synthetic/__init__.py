"""A small procedural world, written as a true nuScenes v1.0 dataroot."""

from slidr.data.synthetic.dataroot import write_dataroot

__all__ = ["write_dataroot"]
