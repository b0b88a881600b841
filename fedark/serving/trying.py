"""A served model is asked a few questions, as an operator would first do it: with the base alone,
and with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from fedark.contract.contract import ModelTerms
from fedark.foundation.errors import FederationError
from fedark.serving.engine import ClearEngine, Engine
from fedark.serving.http import Server
from fedark.serving.keys import once
from fedark.serving.model import read_base
from fedark.serving.models import Models
from fedark.serving.running import beside
from fedark.tuning.adapter import Adapter
from fedark.tuning.task import TaskModel

__all__ = ["ask"]


class _Loaded:
    """See `fedark.serving.models.Bases`."""

    def __init__(self, task: TaskModel) -> None:
        self._task = task

    def engine(self, terms: ModelTerms) -> Engine:
        return ClearEngine(self._task)


def ask(adapter: Adapter, base: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """What a server on loopback answers to each prompt over HTTP, before and after the adapter was
    trained.

    Args:
        base: as in `fedark.serving.model.load`.

    Raises:
        ModelError: as there.
        FederationError: the server did not answer.
    """
    task = TaskModel.load(read_base(adapter.terms, base)[1], adapter.terms)
    models = Models(_Loaded(task))
    keys, key = once()
    try:
        models.load("before", Adapter(adapter.terms, task.initial()))
        models.load("after", adapter)
        headers = {"Authorization": f"Bearer {key}"}
        with (
            beside(Server(models, keys).app) as url,
            httpx.Client(trust_env=False, headers=headers, timeout=120) as client,
        ):
            found = []
            for name in ("before", "after"):
                body = {"model": name, "prompt": list(prompts)}
                reply = client.post(f"{url}/v1/completions", json=body)
                if reply.status_code != 200:
                    raise FederationError(f"The served model did not answer: {reply.status_code}.")
                found.append([choice["text"] for choice in reply.json()["choices"]])
    except httpx.HTTPError as error:
        raise FederationError(f"The served model did not answer: {type(error).__name__}.") from None
    finally:
        models.stop()
    return list(zip(*found, strict=True))
