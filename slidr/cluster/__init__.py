"""Ray: the superpixel job, loading, the worker group."""

import os

# Ray Data shares out the CPUs among those who claim some, and would hold a killed process's claim for 180 s: so long
# would the process that takes its place wait for samples. Read when ray.data is imported, so set before; the workers
# of a cluster started from here inherit it, other clusters' nodes need it in their own environment.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
