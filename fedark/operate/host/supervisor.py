"""Everything that runs at a host: `fedark aggregator up`.

    SuperLink    Flower's relay, on a unix socket of this account, state in SQLite, tasks in
                 processes of their own
    executor     starts the ServerApp of each run
    front        the one port that the world can reach (`front`)
    aggregator   one job's daemon with the aggregator enclave, while the job runs

Commands write into the host's database; the supervisor sees it twice a second and acts: registers
approved nodes, unregisters revoked ones, starts a job when every party has said that it is ready,
writes down how it ended. A process that dies is started again. Killed as a whole, it goes on from
the database: a job that ran is submitted again under its own session.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fedark.contract.contract import Contract, fingerprint, now
from fedark.foundation.errors import FedarkError, FederationError, StorageError, printable
from fedark.foundation.files import private_directory, write_atomic
from fedark.foundation.logs import of_run, tell_error, working_on
from fedark.foundation.metrics import MetricsServer
from fedark.links.flower import configuration, server_app
from fedark.links.flower.adapter import Control
from fedark.links.flower.provision import Provisioned, renew
from fedark.operate import daemon, pinned
from fedark.operate.host import front
from fedark.operate.host.admission import approve, ends_soon, request_of
from fedark.operate.host.folder import HostFolder, host_of, port_of
from fedark.operate.host.observed import StageWatch, host_metrics
from fedark.operate.host.store import JobRecord
from fedark.operate.host.work import Work
from fedark.operate.pages import Pages
from fedark.operate.processes import alive, bound_log, child_environment, flower_environment, module
from fedark.operate.state import locked, socket_of
from fedark.operate.supervisor import LOOK, Supervisor, told_to_stop
from fedark.stages.aggregator import run_of

__all__ = ["run_host"]

_ADMIT_EVERY = 1.0
_BEGIN_SECONDS, _BEGIN_AGAIN_SECONDS = 60.0, 12.0
"""For a submitted run to begin; and once the executor has died, with the task in its hands maybe.
"""
_ATTEMPTS = 20
_RENEW_EVERY = 3600.0
_AGGREGATOR, _EXECUTOR = "aggregator", "superexec"
Say = Callable[[str], None]


class _Host:
    def __init__(self, host: HostFolder, say: Say, work: Work) -> None:
        self._host, self._store, self._say, self._work = host, host.store, say, work
        root = private_directory(host.supervisor)
        logs = private_directory(root / "logs")
        self._state = private_directory(root / "state")
        self._server_log, self._server_config = logs / "serverapp.log", self._state / "server.json"
        self._socket = socket_of(root, "superlink.sock")
        private_directory(self._socket.parent)
        keys = host.provisioned()
        if renew(keys, now()):
            say("the server's certificate was renewed")
        self.children = Supervisor(logs, say)
        self._pages = Pages(host.party_folder / "runs", logs, say)
        self._control: Control | None = None
        self._run_id = self._executors = 0
        self._submitted = self._renewal_due = self._admission_due = 0.0
        self._last_trouble = ""
        metrics = host_metrics(self._store, lambda: self.children.all)
        self._stages = StageWatch(metrics, host.party_folder / "runs")
        self._exporter = (
            MetricsServer(metrics, host.config.metrics) if host.config.metrics else None
        )
        self._start_relay(keys)

    def _start_relay(self, keys: Provisioned) -> None:
        """The SuperLink, its executor, and the front before it."""
        environment = flower_environment(self._state / "flower")
        environment[server_app.CONFIG_VARIABLE] = str(self._server_config)
        commands = pinned.write_commands(self._state / "bin", self._socket, self._server_log)
        environment["PATH"] = os.pathsep.join((str(commands), environment.get("PATH", "")))
        secret = ("--superexec-auth-secret-file", str(keys.superexec_secret))
        superlink = pinned.command(
            self._socket,
            "superlink",
            *("--isolation", "process", "--enable-supernode-auth"),
            "--disable-runtime-dependency-installation",
            *("--ssl-ca-certfile", str(keys.ca), "--ssl-certfile", str(keys.certificate)),
            *("--ssl-keyfile", str(keys.key), *secret),
            *("--database", str(self._state / "superlink.db")),
        )
        file = configuration.write(
            self._state / "front.json", front.FrontSettings(str(self._host.path), str(self._socket))
        )
        self.children.keep("superlink", superlink, environment)
        self.children.keep(_EXECUTOR, pinned.command(self._socket, _EXECUTOR, *secret), environment)
        self.children.keep("front", module(front.__name__, str(file)), child_environment({}))

    def look(self) -> None:
        """One turn of the loop."""
        self.children.look()
        self._pages.look()
        bound_log(self._server_log)
        self._stages.look()
        try:
            self._admit()
            self._jobs()
            self._renew()
        except FedarkError as error:
            self._trouble(error.what, serious=isinstance(error, StorageError))
        else:
            self._trouble("")
        self._tell()

    def close(self) -> None:
        """End everything."""
        if self._control is not None:
            self._control.close()
        self._pages.close()
        try:
            self.children.close()
        finally:
            if self._exporter is not None:
                self._exporter.close()

    def _trouble(self, what: str, *, serious: bool = False) -> None:
        if what != self._last_trouble:
            self._last_trouble = what
            if what and serious:
                tell_error(self._say, what)
            elif what:
                self._say(what)

    def _tell(self) -> None:
        """What `status` shows: written for it, so that it needs no connection to anything."""
        value = {
            "pid": os.getpid(),
            "time": now().isoformat(timespec="seconds"),
            "processes": {
                kept.name: {
                    "pid": kept.pid,
                    "alive": kept.alive,
                    "restarts": kept.restarts,
                    "last_end": kept.last_end,
                }
                for kept in self.children.all
            },
            "trouble": self._last_trouble,
        }
        path = self._state / "status.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)

    # -- nodes

    def _superlink(self) -> Control:
        if self._control is None:
            self._control = Control(self._socket)
        return self._control

    def _admit(self) -> None:
        """Have the SuperLink know the approved nodes and no others."""
        if time.monotonic() < self._admission_due:
            return
        rows = {row.transport.strip(): row for row in self._store.nodes()}
        known = {
            node.public_key.decode().strip(): node
            for node in self._superlink().nodes()
            if node.status != "unregistered"
        }
        for key, row in rows.items():
            if row.status == "approved" and key not in known:
                node_id = self._superlink().register_node(row.name, f"{key}\n".encode())
                self._store.set_node_id(row.name, str(node_id))
                self._say(f"{row.name} may connect")
        for key, node in known.items():
            found = rows.get(key)
            if found is None or found.status != "approved":
                self._superlink().unregister_node(node.node_id)
                self._say(f"{node.name} may not connect any more")
        self._admission_due = time.monotonic() + _ADMIT_EVERY

    def _online(self) -> set[str]:
        keys = {
            row.transport.strip(): row.name
            for row in self._store.nodes()
            if row.status == "approved"
        }
        online = (node for node in self._superlink().nodes() if node.status == "online")
        return {keys[key] for node in online if (key := node.public_key.decode().strip()) in keys}

    def _renew(self) -> None:
        """New certificates for devices whose old ones end soon, and a new revocation list before
        the old one does.
        """
        if time.monotonic() < self._renewal_due:
            return
        self._renewal_due = time.monotonic() + _RENEW_EVERY
        _, crl = self._host.collateral()
        for row in self._store.nodes():
            if row.status != "approved":
                continue
            if ends_soon(row.bundle) or crl.hex() not in row.bundle.decode():
                approve(self._host, row.name, fingerprint(request_of(row).party))
                self._say(f"certificates of {row.name} were renewed")

    # -- jobs

    def _jobs(self) -> None:
        jobs = self._store.open_jobs()
        running = [job for job in jobs if job.status == "running"]
        if running:
            with working_on(**self._names(running[0])):
                self._watch(running[0])
            return
        if self._run_id or _AGGREGATOR in self.children:
            self._stop_run()  # stopped by a command, perhaps while it was being started
        for job in jobs:
            if job.status != "proposed":
                continue
            contract = Contract.decode(job.contract)
            names = [party.name for party in (contract.provider, *contract.customers)]
            answers = self._store.answers(job.digest)
            refused = [name for name in names if answers.get(name, ("", ""))[0] == "refused"]
            if contract.expired(now()):
                self._end(job, "expired", "its contract is not valid any more")
            elif refused:
                self._end(job, "refused", f"refused by {', '.join(refused)}")
            elif all(answers.get(name, ("", ""))[0] == "ready" for name in names):
                missing = sorted(set(names) - self._online())
                if not missing:
                    with working_on(**self._names(job)):
                        self._start(job, contract)
                    return

    def _names(self, job: JobRecord) -> dict[str, str]:
        """What lines about this job carry."""
        return of_run(bytes.fromhex(job.digest), run_of(self._host.party_folder, job.digest))

    def _start(self, job: JobRecord, contract: Contract) -> None:
        session = job.session or secrets.token_hex(32)
        folder = private_directory(self._state / "jobs" / job.digest[:32])
        write_atomic(folder / "contract.cbor", job.contract, mode=0o600)
        keys = {row.name: row.transport for row in self._store.nodes() if row.status == "approved"}
        names = [party.name for party in (contract.provider, *contract.customers)]
        if missing := [name for name in names if name not in keys]:
            self._end(job, "failed", f"{', '.join(missing)} may not connect any more")
            return
        aggregator = socket_of(folder)
        private_directory(aggregator.parent)
        private_directory(folder / "run")
        if _AGGREGATOR not in self.children:
            where = {
                "folder": str(self._host.party_folder),
                "contract": str(folder / "contract.cbor"),
            }
            settings = daemon.DaemonSettings(str(aggregator), self._work.aggregator, where)
            file = configuration.write(folder / "run" / "daemon.json", settings)
            self.children.keep(
                _AGGREGATOR, module(daemon.__name__, str(file)), child_environment({})
            )
        server = server_app.AppSettings(
            coordinator=self._work.coordinator,
            aggregator=str(aggregator),
            roster={name: keys[name] for name in names},
            settings=self._work.settings,
        )
        configuration.write(self._server_config, server)
        server_app.forget(self._server_config)
        self._store.set_job(job.digest, "running", session=session)
        self._submitted, self._executors = time.monotonic(), self.children[_EXECUTOR].restarts
        self._run_id = self._superlink().start_run()
        configuration.write(self._server_config, replace(server, run=self._run_id))
        self._say(f"job {job.name} runs (attempt {job.attempts + 1})")

    def _watch(self, job: JobRecord) -> None:
        contract = Contract.decode(job.contract)
        outcome = self._outcome(job)
        if outcome is not None:
            status, reason, run = outcome
            self._stop_run()
            self._end(job, status, reason, run)
        elif _AGGREGATOR not in self.children or not self._run_id:  # started anew
            self._again(job, contract, "the host was restarted")
        elif contract.expired(now()):
            self._stop_run()
            self._end(job, "expired", "its contract is not valid any more")
        else:
            state = self._superlink().run_state(self._run_id)
            if (state.finished or self._server_died()) and self._outcome(job) is None:
                self._again(
                    job,
                    contract,
                    state.details or state.sub_status or "its ServerApp ended without a word",
                )

    def _again(self, job: JobRecord, contract: Contract, why: str) -> None:
        """Submit a job again whose ServerApp ended without an outcome: the session, and what its
        parties keep of it, stays.
        """
        self._cancel()
        if job.attempts >= _ATTEMPTS:
            self._stop_run()
            self._end(
                job,
                "failed",
                f"gave up after {job.attempts} attempts; the last one ended so: {printable(why)}",
            )
            return
        self._say(f"job {job.name} is submitted again: {printable(why, 200)}")
        self._start(job, contract)

    def _server_died(self) -> bool:
        """The SuperLink notices late that a ServerApp was killed, and not at all that its executor
        was before it began: an executor that dies between taking a task and starting its process
        takes the task along.
        """
        pid = server_app.running(self._server_config)
        if pid > 0:
            return not alive(pid)
        anew = self.children[_EXECUTOR].restarts != self._executors
        patience = _BEGIN_AGAIN_SECONDS if anew else _BEGIN_SECONDS
        return time.monotonic() > self._submitted + patience

    def _cancel(self) -> None:
        if self._run_id:
            with suppress(FederationError):
                self._superlink().stop_run(self._run_id)
            self._run_id = 0

    def _stop_run(self) -> None:
        self._cancel()
        self.children.end(_AGGREGATOR)

    def _end(self, job: JobRecord, status: str, reason: str, run: str = "") -> None:
        self._store.set_job(job.digest, status, reason, run=run)  # type: ignore[arg-type]
        if status == "done":
            report = self._host.party_folder / "runs" / run / "report.json"
            self._stages.passed_over(json.loads(report.read_bytes()))
        tell = f"job {job.name} is {status}{f': {reason}' if reason else ''}"
        if status == "failed":
            tell_error(self._say, tell)
        else:
            self._say(tell)

    def _outcome(self, job: JobRecord) -> tuple[str, str, str] | None:
        """Status, reason and folder of a job that ended: what the aggregator wrote into a run
        folder that is no other job's.
        """
        known = self._store.runs()
        since = datetime.fromisoformat(job.created).astimezone(UTC).timestamp()
        for folder in sorted((self._host.party_folder / "runs").glob("*")):
            if folder.name in known or folder.stat().st_mtime < since:
                continue
            if (path := folder / "report.json").is_file():
                report = json.loads(path.read_bytes())
                if report.get("contract") == job.digest:
                    return "done", "", folder.name
            elif (path := folder / "failed.json").is_file():
                failed = json.loads(path.read_bytes())
                if failed.get("contract") == job.digest:
                    return "failed", printable(str(failed.get("what", "")), 4000), folder.name
        return None


def run_host(path: Path, say: Say, work: Work | None = None) -> None:
    """Run a host until SIGTERM or SIGINT.

    Args:
        work: what it runs for a job.

    Raises:
        InputError, ContractError: the folder is not in order.
        FederationError: another process runs it, or its address cannot be listened on.
    """
    host = HostFolder.open(path)
    _require_free(host.config.listen)
    stop = told_to_stop()
    with locked(host.path):
        running = _Host(host, say, work or Work())
        say(f"{host.config.name} listens on {host.config.listen}; nodes use {host.config.address}")
        try:
            while not stop.is_set():
                running.look()
                stop.wait(LOOK)
        finally:
            running.close()


def _require_free(listen: str) -> None:
    """Raise FederationError if the front cannot listen there: said once, at the start, and not by a
    child that keeps dying.
    """
    where = (host_of(listen), port_of(listen))
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        socket.create_server(where, family=family).close()
    except OSError as error:
        raise FederationError(
            f"The front cannot listen on {listen}: {error.strerror}.",
            safe="Nothing was started.",
            fix=(
                f"See who has the port (ss -ltnp 'sport = :{where[1]}'), or set `listen` in"
                " host.toml to an address of this machine."
            ),
        ) from None
