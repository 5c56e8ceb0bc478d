"""The calibration of the shipped model that the commands' tests have, and workers on a real Ray."""

import pytest

from comfyui_nibble.quant_core.cluster.session import Cluster, findable
from comfyui_nibble.tests.quant_core.cli.conftest import calibration
from comfyui_nibble.tests.support import single_thread

__all__ = ["calibration"]


@pytest.fixture(scope="module")
def one_thread():
    """As many as a task has."""
    with single_thread():
        yield


@pytest.fixture(scope="module")
def machine():
    """Ray with four workers, each with a GPU that is none."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra [cluster] has it")
    with findable():
        ray.init("local", num_cpus=4, num_gpus=4, include_dashboard=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(params=[1, 2, 4], ids="{} workers".format)
def cluster(request, machine):
    """So many workers: a task takes as many GPUs as leave room for no more. Processes are the same, with
    their imports."""
    return Cluster(machine, gpus=4 / request.param)


@pytest.fixture
def pair(machine):
    """Two workers, for what does not depend on their number."""
    return Cluster(machine, gpus=2)
