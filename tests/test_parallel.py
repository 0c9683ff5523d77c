"""Between two gloo processes: DistributedDataParallel, FSDP2 and one_weird_trick against a single process."""

import parallel_checks
import pytest
import torch.multiprocessing as multiprocessing


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{check: tracebacks of the processes in which it failed}; one start of processes serves all checks."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    rendezvous = tmp_path_factory.mktemp("processes") / "rendezvous"
    processes = [
        context.Process(target=parallel_checks.main, args=(rank, rendezvous, queue), daemon=True)
        for rank in range(parallel_checks.WORLD)
    ]
    for process in processes:
        process.start()
    found = {name: [] for name in parallel_checks.CHECKS}
    for _ in range(len(found) * parallel_checks.WORLD):
        name, failure = queue.get(timeout=120)
        found[name] += [failure] if failure else []
    for process in processes:
        process.join(60)
    return found


@pytest.mark.parametrize("name", parallel_checks.CHECKS)
def test_two_processes(results, name):
    assert not results[name], "\n".join(results[name])
