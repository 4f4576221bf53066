"""Which maker draws which category: everything that gets a box in the annotations.

A maker adds an object's parts in the object's own frame (x forward, y left, z up, on the ground), newly drawn from a
random generator, and returns the size of the object's box. Colours, sizes and lidar reflectivities come from ranges
that overlap between classes: an orange thing may be a cone, a barrier, a machine or a jacket.
"""

from __future__ import annotations

from collections.abc import Callable

from slidr.data.synthetic.palette import Size
from slidr.data.synthetic.people import bicycle, motorcycle, pedestrian
from slidr.data.synthetic.roadside import barrier, traffic_cone
from slidr.data.synthetic.vehicles import bus, car, construction_vehicle, trailer, truck

MAKERS: dict[str, Callable[..., Size]] = {
    "vehicle.car": car,
    "vehicle.bus.rigid": bus,
    "vehicle.bus.bendy": bus,
    "vehicle.truck": truck,
    "vehicle.trailer": trailer,
    "vehicle.construction": construction_vehicle,
    "vehicle.motorcycle": motorcycle,
    "vehicle.bicycle": bicycle,
    "human.pedestrian.adult": pedestrian,
    "human.pedestrian.child": pedestrian,
    "human.pedestrian.construction_worker": pedestrian,
    "human.pedestrian.police_officer": pedestrian,
    "movable_object.barrier": barrier,
    "movable_object.trafficcone": traffic_cone,
}
