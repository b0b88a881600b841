"""The legal order of an enclave's calls, as one table that code, tests and documentation read.

A session is in one state of each region of its role: how far the run is, what its memory holds, how
far the masked session is. `TABLES[role, mode]` says for (region, state, call) which handler answers
the call, which state follows, and whether the session's checkpoint goes out with the reply. A call
is legal if every region that knows it has it in its present state; else it is refused, with the
reason of the first region that has not, and nothing changes. `docs/enclave-states.md` is made from
this table by `make states`.

What the table cannot say, the handlers check: whose message it is, of which round and model, and
whether it is the same as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fedark.foundation.errors import ProtocolError
from fedark.v1 import enclave_pb2 as pb

__all__ = ["TABLES", "If", "Region", "State", "Step", "Table", "find", "name_of", "start"]


class State(Enum):
    """States of all regions; each belongs to one region of one role, or to the same of both."""

    # how far the run is: both roles
    NEW = "new"
    # of a trainer
    PROVING = "proving"
    ADMITTED = "aggregator admitted"
    BEGUN = "begun"
    TRAINING = "training"
    MEASURED = "measured"
    # of an aggregator
    LOADING = "loading"
    ROUNDS = "rounds"
    MEASURING = "measuring"
    ENDED = "ended"
    # of an inference enclave
    CLOSED = "no weights"
    ANSWERING = "answering"
    # what a trainer's memory holds
    EMPTY = "empty"
    WEIGHTS = "weights"
    FILLED = "weights and records"
    # the masked session: both roles
    UNMASKED = "not masked"
    APART = "apart"
    ANNOUNCED = "announced"
    JOINED = "keys agreed"
    OPEN = "round open"


@dataclass(frozen=True)
class If:
    """The state that follows, by the session's property `test` once the handler is through."""

    test: str
    then: State
    otherwise: State


@dataclass(frozen=True)
class Step:
    """What a call does in one state of one region.

    Attributes:
        handler: the session's method that answers the call; empty in the regions that only watch.
        next: the state that follows; None: the same.
        seals: the reply carries the session's checkpoint.
    """

    handler: str = ""
    next: State | If | None = None
    seals: bool = False


Reason = tuple[str, str]


@dataclass(frozen=True)
class Region:
    """One machine of a table.

    Attributes:
        start: its first state.
        steps: state -> call -> what the call does.
        refusals: why a call is refused, and what was kept safe: of a call in one state, else of the
            call, else of the state.
        lasts: its state is in the session's checkpoint; else a restarted enclave begins at `start`.
    """

    start: State
    steps: Mapping[State, Mapping[str, Step]]
    refusals: Mapping[tuple[State, str] | str | State, Reason]
    lasts: bool = True

    @property
    def calls(self) -> frozenset[str]:
        """The calls that this region has a say in."""
        stepped = (call for steps in self.steps.values() for call in steps)
        return frozenset(stepped) | {call for call in self.refusals if isinstance(call, str)}

    def reason(self, state: State, call: str) -> Reason:
        """Why a call that this region knows is refused in a state."""
        known = ((state, call), call, state)
        return next((self.refusals[key] for key in known if key in self.refusals), _OUT_OF_ORDER)


Table = Mapping[str, Region]


def name_of(call: pb.Call) -> str:
    """What the table calls a message: some kinds are several calls."""
    kind = str(call.WhichOneof("body"))
    if kind == "records" and call.records.last:
        return "records, last"
    if kind == "submit" and call.submit.part == pb.Submit.CURVE:
        return "submit, curve"
    if kind == "close" and call.close.curve:
        return "close, curve"
    if kind == "submit" and call.submit.part == pb.Submit.ENDORSEMENT:
        return "submit, endorsement"
    if kind == "submit" and call.submit.part == pb.Submit.SHARES:
        return "submit, shares"
    if (kind == "submit" and not call.submit.round) or (kind == "close" and not call.close.round):
        return f"{kind}, loading"
    return kind


def start(table: Table) -> dict[str, State]:
    """Where a new session stands."""
    return {name: region.start for name, region in table.items()}


def find(table: Table, at: Mapping[str, State], call: str, **facts: object) -> dict[str, Step]:
    """The step of every region that has a say in a call.

    Args:
        facts: for the texts of refusals.

    Raises:
        ProtocolError: the call is not legal now.
    """
    steps: dict[str, Step] = {}
    for name, region in table.items():
        found = region.steps.get(at[name], {}).get(call)
        if found is not None:
            steps[name] = found
        elif call in region.calls:
            what, safe = region.reason(at[name], call)
            raise ProtocolError(what.format(call=call, **facts), safe=safe)
    if not steps:
        raise ProtocolError(
            "An enclave of role {role} does not answer {call!r}.".format(call=call, **facts)
        )
    return steps


_OUT_OF_ORDER = ("A call of kind {call!r} is out of order.", "The enclave goes on as it is.")
_RESUMED = ("A checkpoint can only begin a session.", "The enclave goes on as it is.")
_WAITS = ("The aggregator enclave has not been admitted yet.", "The trainer enclave did nothing.")
_NOT_BEGUN = (
    "A round was asked for before the enclave had begun.",
    "The trainer enclave did nothing.",
)
_BEGUN = ("This enclave has begun already.", "It goes on as it is.")
_INCOMPLETE = (
    "Training was asked for before weights and records were complete.",
    "The trainer enclave did nothing.",
)
_TOO_EARLY = ("Records came before the weights.", "They were dropped.")
_MASKS_NOTHING = ("The contract does not mask its updates.", "The enclave did nothing.")
_NO_KEYS = ("No keys were agreed with the fellow trainers yet.", "No record was opened.")
_LATE = ("A message for round {number} came in round {round}.", "It was dropped.")
_WRONG_CLOSE = ("Round {number} cannot be closed in round {round}.", "Nothing was summed.")
_UNFINISHED = ("The adapter is not finished yet.", "Nothing was delivered.")
_UNMEASURED = ("The final adapter was not measured here.", "No personal adapter left.")
_LOADED = ("Loading is not masked: it brings nothing of a customer.", "Nothing was opened.")
_NO_ROUND = ("No masked round is open.", "Nothing was summed.")
_NO_MASKS_YET = ("No round was begun.", "Nothing was revealed.")
_STRANGER = (
    "A message came from a customer whose trainer enclave is not admitted.",
    "It was dropped.",
)

# -- what every enclave answers at any time
_ALWAYS = {
    "start": Step("_start"),
    "challenge": Step("_challenge", seals=True),
    "attest": Step("_attest", seals=True),
    "vouch": Step("_vouch", seals=True),
}


def _new(following: State) -> dict[str, Step]:
    """A new session: whatever it is asked first ends its chance to go on from a checkpoint."""
    asked = {
        call: Step(step.handler, None if call == "start" else following, step.seals)
        for call, step in _ALWAYS.items()
    }
    return asked | {"resume": Step("_resume")}


_PEERS = {"peer_nonce": Step()}
_ADMITTED = (
    _ALWAYS
    | _PEERS
    | {"admit_peer": Step("_admit_again", seals=True)}
    | dict.fromkeys(("announce", "join", "grant", "reopen", "sealed"), Step())
    | dict.fromkeys(("records", "records, last"), Step())
)
_MEMBER = {"endorse": Step(), "unmask": Step()}
_EVALUATE = {"evaluate": Step("_evaluate", State.MEASURED, seals=True)}
_MEASURE = {"measure": Step("_measure_global", seals=True)}

_TRAINER_RUN = Region(
    State.NEW,
    {
        State.NEW: _new(State.PROVING)
        | {
            "peer_nonce": Step(next=State.PROVING),
            "admit_peer": Step("_admit_first", State.ADMITTED, seals=True),
        },
        State.PROVING: _ALWAYS
        | _PEERS
        | {"admit_peer": Step("_admit_first", State.ADMITTED, seals=True)},
        State.ADMITTED: _ADMITTED | {"begin": Step("_begin", State.BEGUN, seals=True)},
        State.BEGUN: _ADMITTED
        | _EVALUATE
        | _MEASURE
        | {
            "begin": Step("_begin_again", seals=True),
            "round": Step("_round", State.TRAINING, seals=True),
        },
        State.TRAINING: _ADMITTED
        | _EVALUATE
        | _MEASURE
        | _MEMBER
        | {"round": Step("_round", seals=True)},
        State.MEASURED: _ADMITTED | _EVALUATE | _MEMBER | {"personal": Step("_personal_adapters")},
    },
    {
        State.NEW: _WAITS,
        State.PROVING: _WAITS,
        State.ADMITTED: _NOT_BEGUN,
        State.BEGUN: _NO_MASKS_YET,
        State.TRAINING: _BEGUN,
        State.MEASURED: _BEGUN,
        (State.MEASURED, "round"): (
            "Round {number} was asked for after round {round}: no round is trained twice.",
            "Nothing was trained.",
        ),
        (State.MEASURED, "measure"): (
            "The final adapter was measured already: no other is measured now.",
            "Nothing was measured.",
        ),
        "personal": _UNMEASURED,
        "resume": _RESUMED,
    },
)
_REFILL = {"grant": Step("_grant", State.EMPTY, seals=True), "reopen": Step("_reopen", State.EMPTY)}
_TRAINER_MEMORY = Region(
    State.EMPTY,
    {
        State.EMPTY: _REFILL
        | {"sealed": Step("_sealed", If("weights_open", State.WEIGHTS, State.EMPTY))},
        State.WEIGHTS: _REFILL
        | {
            "records": Step("_take"),
            "records, last": Step(
                "_take", If("records_kept", State.FILLED, State.WEIGHTS), seals=True
            ),
        },
        State.FILLED: _REFILL | dict.fromkeys(("begin", "round", "measure", "evaluate"), Step()),
    },
    {
        State.EMPTY: _INCOMPLETE,
        State.WEIGHTS: _INCOMPLETE,
        "sealed": ("Sealed bytes came for a model without a grant.", "They were dropped."),
        (State.EMPTY, "records"): _TOO_EARLY,
        (State.EMPTY, "records, last"): _TOO_EARLY,
        State.FILLED: ("Records came after the last ones.", "They were dropped."),
    },
    lasts=False,
)
_NONCE = {"peer_nonce": Step("_peer_nonce", seals=True)}
_ANNOUNCE = {"announce": Step("_announce", State.ANNOUNCED, seals=True)}
_JOIN = {"join": Step("_join", State.JOINED, seals=True)}
_TRAINER_MASKS = Region(
    State.APART,
    {
        State.APART: _NONCE | _ANNOUNCE,
        State.ANNOUNCED: _NONCE | _ANNOUNCE | _JOIN,
        State.JOINED: _NONCE
        | {
            "announce": Step("_announce", seals=True),
            "join": Step("_join", seals=True),
            "endorse": Step("_endorse", seals=True),
            "unmask": Step("_unmask", seals=True),
            "grant": Step(),
        },
    },
    {State.APART: _NO_KEYS, State.ANNOUNCED: _NO_KEYS},
)

_SUMS = {
    "submit": Step("_submit"),
    "close": Step("_close", If("rounds_over", State.MEASURING, State.ROUNDS), seals=True),
}
_CURVE = {
    "submit, curve": Step("_submit_curve"),
    "close, curve": Step(
        "_close_curve", If("rounds_over", State.MEASURING, State.ROUNDS), seals=True
    ),
}
_SUBMITS = ("submit", "submit, loading", "submit, curve", "submit, endorsement", "submit, shares")
_EARLY: dict[tuple[State, str] | str | State, Reason] = {
    **dict.fromkeys((*_SUBMITS, "survivors"), _LATE),
    **dict.fromkeys(("close", "close, loading", "close, curve"), _WRONG_CLOSE),
    (State.NEW, "submit, loading"): _STRANGER,
    (State.NEW, "open_round"): _LOADED,
    (State.LOADING, "open_round"): _LOADED,
    "deliver": _UNFINISHED,
    "resume": _RESUMED,
}


def _aggregator_run(masked: bool) -> Region:
    """An aggregator's run. In mode "sealed" only the measurements guard the last round against a
    second sum (`fedark.enclave.checkpoint`): the adapter is delivered once they are closed. Under
    masks the end of the rounds is enough, as too few may be left to measure.
    """
    again = _ALWAYS | {"admit_peer": Step("_admit_again", seals=True)}
    masks = {
        "open_round": Step(),
        "survivors": Step(),
        "submit, endorsement": Step(),
        "submit, shares": Step(),
    }
    deliver = {"deliver": Step("_deliver")}
    loading = {
        "admit_peer": Step("_admit_first", State.LOADING, seals=True),
        "join": Step(),
        "submit, loading": Step("_submit"),
        "close, loading": Step("_close", State.ROUNDS, seals=True),
    }
    measuring = _SUMS | {"close": Step("_close", State.ENDED, seals=True)}
    return Region(
        State.NEW,
        {
            State.NEW: _new(State.LOADING) | {"admit_peer": loading["admit_peer"]},
            State.LOADING: _ALWAYS | loading,
            State.ROUNDS: again | masks | _SUMS | _CURVE,
            State.MEASURING: again | masks | measuring | (deliver if masked else {}),
            State.ENDED: again | deliver,
        },
        _EARLY,
    )


_AGGREGATOR_MASKS = Region(
    State.APART,
    {
        State.APART: _JOIN,
        State.JOINED: {
            "join": Step("_join", seals=True),
            "open_round": Step("_open_round", State.OPEN, seals=True),
        },
        State.OPEN: {
            "open_round": Step("_open_round", seals=True),
            "survivors": Step("_survivors", seals=True),
            "submit": Step(),
            "submit, endorsement": Step("_endorsed"),
            "submit, shares": Step("_shared"),
            "close": Step(next=State.JOINED),
        },
    },
    {
        State.APART: _NO_ROUND,
        State.JOINED: _NO_ROUND,
        (State.APART, "open_round"): ("No masked session was joined.", "Nothing was opened."),
    },
)


def _unmasked(region: Region, *watched: str) -> Region:
    """The region of a contract that is not masked: it refuses what only masked sessions have."""
    return Region(
        State.UNMASKED,
        {State.UNMASKED: dict.fromkeys(watched, Step())},
        dict.fromkeys(region.calls - set(watched), _MASKS_NOTHING),
    )


_PROVES = {call: Step(f"_{call}") for call in ("start", "attest", "vouch")}
_INFERENCE_MEMORY = Region(
    State.CLOSED,
    {
        State.CLOSED: _PROVES
        | {
            "grant": Step("_grant"),
            "sealed": Step("_sealed", If("open", State.ANSWERING, State.CLOSED)),
        },
        State.ANSWERING: _PROVES
        | {
            "grant": Step("_renew"),
            "adapter": Step("_adapter"),
            "ask": Step("_ask"),
            "write": Step("_write"),
        },
    },
    {
        State.CLOSED: ("No weights are open under a lease that is good.", "Nothing was answered."),
        "sealed": ("Sealed bytes came for weights that are open already.", "They were dropped."),
    },
    lasts=False,
)

TABLES: Mapping[tuple[str, str], Table] = {
    ("trainer", "sealed"): {
        "masks": _unmasked(_TRAINER_MASKS, "grant"),
        "run": _TRAINER_RUN,
        "memory": _TRAINER_MEMORY,
    },
    ("trainer", "masked"): {
        "masks": _TRAINER_MASKS,
        "run": _TRAINER_RUN,
        "memory": _TRAINER_MEMORY,
    },
    ("aggregator", "sealed"): {
        "masks": _unmasked(_AGGREGATOR_MASKS, "submit", "close"),
        "run": _aggregator_run(False),
    },
    ("aggregator", "masked"): {"masks": _AGGREGATOR_MASKS, "run": _aggregator_run(True)},
    ("inference", "leased"): {"memory": _INFERENCE_MEMORY},
}
