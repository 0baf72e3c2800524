"""A plugin of pytest for tests on a GPU, in many processes and perhaps cut short: `pytest -p bench.gpu_tests`.

Why a test failed is said when it fails, since a run that is killed says nothing at its end. A process whose CUDA
context is lost ends, so that pytest-xdist starts another and no test after the one to blame fails.
"""

import os

import pytest
import torch

LINES = 12  # of a traceback
LOG = os.dup(2)  # as it is before pytest captures what tests write to it


class Reasons:
    """Says why tests fail, in the process that reports for all."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            reason = report.longreprtext.splitlines()[-LINES:]
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line("\n".join([f"\nWHY {report.nodeid} ({report.when})", *reason]))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reasons(config))


@pytest.hookimpl(trylast=True)  # after the test's own
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        lost = f"the CUDA context is lost after {item.nodeid}: {error}"
        os.write(LOG, f"\n{lost}\n".encode())
        if hasattr(item.config, "workerinput"):
            os._exit(3)
        pytest.exit(lost, returncode=3)
