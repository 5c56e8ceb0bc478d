"""The list scheduler on graphs small enough to be worked out by hand."""

import pytest

from comfyui_nibble.quant_core.cluster.simulate import Machine, NoPlace, Phase, Storage, Task, simulated


def seconds(tasks, machines, storage=None, **phase):
    return simulated(Phase("phase", tasks, **phase), machines, storage).seconds


def of(*times):
    return [Task(time, memory=round(time)) for time in times]


@pytest.mark.parametrize(("cpus", "expected"), [(1, 15), (2, 8), (3, 5), (4, 5), (5, 5), (9, 5)])
def test_the_largest_begin_first(cpus, expected):
    """5, 4, 3, 2, 1: two do 5 + 2 + 1 and 4 + 3, three 5, 4 + 1 and 3 + 2."""
    assert seconds(of(1, 2, 3, 4, 5), [Machine(cpus)]) == expected


def test_equal_memory_keeps_the_order_of_the_items():
    """1, 1 and then 4 on two CPUs: nobody knows that the last is long."""
    assert seconds([Task(1), Task(1), Task(4)], [Machine(2)]) == 5


def test_memory_and_gpus_hold_back_as_cpus_do():
    tasks = [Task(2, memory=6)] * 4
    assert seconds(tasks, [Machine(8, 0, 12)]) == 4
    assert seconds(tasks, [Machine(8, 0, 6)] * 2) == 4
    assert seconds(tasks, [Machine(8, 1, 24)], gpus=1) == 8
    assert seconds(tasks, [Machine(8, 1, 24)], gpus=0.5) == 4
    assert seconds(tasks, [Machine(8, 0, 24)], cpus=4) == 4


def test_a_smaller_task_goes_ahead_of_one_that_has_to_wait():
    """9 begins; 8 waits for its memory while 3 runs beside 9."""
    tasks = [Task(2, memory=9), Task(1, memory=8), Task(1, memory=3)]
    assert seconds(tasks, [Machine(8, 0, 12)]) == 3


def test_what_fits_no_machine_is_refused():
    with pytest.raises(NoPlace):
        seconds([Task(1, memory=7)], [Machine(8, 0, 6)])


def test_each_process_starts_once_and_each_machine_reads_once():
    """Two processes of 3 s and 10 bytes at 5 a second, two tasks of 1 s for each; the second process finds
    the bytes in the page cache."""
    phase = {"start": 3, "start_reads": 10}
    assert seconds([Task(1)] * 2, [Machine(1)], Storage(5, 5), **phase) == 3 + 2 + 1 + 1
    assert seconds([Task(1)] * 4, [Machine(2)], Storage(5, 5), **phase) == 3 + 2 + 1 + 1
    assert seconds([Task(1)] * 2, [Machine(1)] * 2, Storage(5, 5), **phase) == 3 + 2 + 2 + 1


def test_the_storage_serves_one_after_the_other():
    tasks = [Task(1, reads=10, writes=20)] * 2
    assert seconds(tasks, [Machine(2)]) == 1
    assert seconds(tasks, [Machine(2)], Storage(total=10)) == 1 + 1 + 2 + 2
    assert seconds(tasks, [Machine(1)] * 2, Storage(total=100, machine=10)) == 1 + 1 + 2


def test_no_more_run_at_once_than_there_are():
    assert simulated(Phase("phase", of(1, 1, 1)), [Machine(8)]).at_once == 3
    assert simulated(Phase("phase", of(1, 1, 1)), [Machine(2)]).at_once == 2
