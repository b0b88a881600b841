"""Which session runs in an enclave: the one of the role that its run configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedark.contract.lease import INFERENCE
from fedark.enclave.checkpoint import SealingKey
from fedark.enclave.session import LeaseConfig, Quote, RunConfig, Session, role_of

if TYPE_CHECKING:
    from fedark.tuning.task import TaskModel

__all__ = ["create"]


def create(
    run_config: bytes,
    quote: Quote,
    sealing_key: SealingKey | None = None,
    on_model: Callable[[TaskModel], None] | None = None,
) -> Session:
    """The session for a run configuration. Call it after the sandbox is locked: it makes the keys.

    Args:
        sealing_key: asks the platform for the key of checkpoints; without it none are made or
            taken.
        on_model: told of every model that a trainer has opened: a simulation lets those of one
            process share their frozen weights.

    Raises:
        ProtocolError, ContractError: the run configuration is not usable.
    """
    if role_of(run_config) == INFERENCE:
        from fedark.enclave.inference import InferenceSession  # torch

        return InferenceSession(LeaseConfig.decode(run_config), quote)
    config = RunConfig.decode(run_config)
    if config.role == "trainer":
        from fedark.enclave.trainer import TrainerSession  # torch: not for the aggregator

        return TrainerSession(config, quote, sealing_key, on_model)
    from fedark.enclave.aggregator import AggregatorSession

    return AggregatorSession(config, quote, sealing_key)
