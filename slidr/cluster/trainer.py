"""Ray's trainer, with this process's own handling of Ctrl-C."""

from __future__ import annotations

import contextlib
from typing import Any

from ray.train.torch import TorchTrainer


class InterruptibleTrainer(TorchTrainer):
    """A trainer whose `fit` raises `KeyboardInterrupt` on Ctrl-C, and whose workers then end.

    Ray Train's own handler of SIGINT exits by `sys.exit` without a word, and outlives `fit`.
    """

    _controller: Any = None

    def fit(self) -> Any:
        try:
            return super().fit()
        except KeyboardInterrupt:
            self._abort()
            raise
        except SystemExit as ended:  # another version of Ray that sets its handler in another way
            raise KeyboardInterrupt from ended

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def _abort(self) -> None:
        """Tells the worker group to end, without waiting for it: SIGKILL may follow a SIGTERM within 3 s.

        A private cluster ends with this process in any case, and every cluster ends a gone driver's workers.
        """
        if self._controller is not None:
            with contextlib.suppress(Exception):  # a cluster that does not answer
                self._controller.abort.remote()
