"""A cluster under mTLS and tokens, as real processes: what works, and what every port refuses."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from twinpool import Client, PermissionDenied, Tls, Unauthenticated
from twinpool.v1 import inference_pb2, worker_pb2

from launch.builtin import MODEL_DIR
from service.security.rights import RIGHTS, Right
from service.security.tokens import hash_of, new_token
from tests.certificates import Authority, Pair
from tests.integration.cluster import ROOT, Cluster, wait_until

TENANT, ADMIN, LATER = (new_token() for _ in range(3))
WORKER = new_token()
# The ranks' own method is at a port that only they know.
METHODS = sorted(
    f"/{service.full_name}/{method.name}"
    for file in (inference_pb2, worker_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
ROLE_OF = {"Inference": "router", "Membership": "router", "Prefill": "prefill", "Decode": "decode"}


@dataclass(frozen=True)
class Setup:
    """Certificates and tokens, as files that tests may change."""

    folder: Path
    authority: Authority
    node: Pair
    user: Pair

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens.yaml"

    def tls(self, pair: Pair | None) -> Tls:
        if pair is None:
            return Tls(ca=self.authority.pem)
        return Tls(ca=self.authority.pem, cert=pair.cert, key=pair.key)

    def allow(self, **tokens: tuple[str, Right]) -> None:
        """Writes the tokens file."""
        entries = [
            {"name": name, "tenant": name, "rights": [right.value], "sha256": hash_of(token)}
            for name, (token, right) in tokens.items()
        ]
        self.tokens.write_text(yaml.safe_dump({"tokens": entries}))

    def flags(self) -> tuple[str, ...]:
        """What every process is given."""
        files = ("--tls-cert", self.node.cert, "--tls-key", self.node.key)
        more = ("--tls-ca", self.authority.pem, "--worker-token-file", self.folder / "worker")
        return (*map(str, (*files, *more)), "--tls-require-client-cert")


class SecuredCluster(Cluster):
    """Its own client is an admin with a certificate."""

    def __init__(self, setup: Setup, logs: Path) -> None:
        self.setup = setup
        flags = setup.flags()
        router_flags = (*flags, "--tokens-file", str(setup.tokens), "--reflection")
        decode_flags = {"decode": ("--tp", "2")}
        super().__init__(
            MODEL_DIR, logs, *flags, router_flags=router_flags, more_flags=decode_flags
        )

    def client(self) -> Client:
        return self.client_of(ADMIN)

    def client_of(self, token: str | None, pair: Pair | None = None) -> Client:
        tls = self.setup.tls(pair or self.setup.user)
        return Client(self.address, tls=tls, token=token)

    def port_of(self, role: str) -> str:
        """A role's address."""
        command = self._commands[role]
        return f"127.0.0.1:{command[command.index('--port') + 1]}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredCluster]:
    folder = tmp_path_factory.mktemp("secrets")
    authority = Authority(folder)
    setup = Setup(folder, authority, authority.issue("node"), authority.issue("user"))
    (folder / "worker").write_text(WORKER)
    setup.allow(tenant=(TENANT, Right.INFERENCE), admin=(ADMIN, Right.ADMIN))
    with SecuredCluster(setup, tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


def test_answers_come_over_mtls_with_tokens(secured: SecuredCluster) -> None:
    with secured.client_of(TENANT) as client:
        answer = client.complete([1] * 40, max_new_tokens=5, ignore_eos=True)
    assert len(answer.token_ids) == 5
    assert answer.stats.decode_instance == "decode"
    secured.wait_idle()
    for role in ("router", "prefill", "decode"):
        log = secured.log(role)
        assert not any(token in log for token in (TENANT, ADMIN, WORKER))
        assert "PRIVATE KEY" not in log


def refusal(
    address: str, method: str, credentials: grpc.ChannelCredentials | None, token: str | None
) -> grpc.StatusCode:
    """How a call of a method ends that sends one empty message, whatever kind it is."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.insecure_channel(address, options=options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options=options)
    )
    metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
    with closing(channel):
        start: Any = channel.stream_stream(method)
        try:
            list(start(iter([b""]), metadata=metadata, timeout=2))
        except grpc.RpcError as error:
            code = error.code()
            assert isinstance(code, grpc.StatusCode)
            return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_refused_without_the_right_credentials(
    secured: SecuredCluster, method: str
) -> None:
    setup = secured.setup
    role = ROLE_OF[method.split("/")[1].rpartition(".")[2]]
    address = secured.port_of(role)
    good = setup.tls(setup.user).credentials()
    code = grpc.StatusCode
    for token in (None, new_token(), "x", hash_of(TENANT)):
        assert refusal(address, method, good, token) is code.UNAUTHENTICATED
    if RIGHTS[method] is not Right.INFERENCE:
        wrong = code.PERMISSION_DENIED if role == "router" else code.UNAUTHENTICATED
        assert refusal(address, method, good, TENANT) is wrong
    else:
        assert refusal(address, method, good, ADMIN) is code.PERMISSION_DENIED
        assert refusal(address, method, good, WORKER) is code.PERMISSION_DENIED
    token = {Right.WORKER: WORKER, Right.ADMIN: ADMIN, Right.INFERENCE: TENANT}[RIGHTS[method]]
    expired = setup.tls(setup.authority.issue("expired", days=-1)).credentials()
    for credentials in (None, setup.tls(None).credentials(), expired):
        assert refusal(address, method, credentials, token) is code.UNAVAILABLE
    assert refusal(address, method, good, token) not in (
        code.UNAUTHENTICATED,
        code.PERMISSION_DENIED,
    )


def test_tokens_change_without_a_restart(secured: SecuredCluster) -> None:
    setup = secured.setup
    with secured.client_of(LATER) as later, secured.client_of(TENANT) as tenant:
        with pytest.raises(Unauthenticated):
            later.complete([1] * 4, max_new_tokens=1)
        try:
            setup.allow(later=(LATER, Right.INFERENCE), admin=(ADMIN, Right.ADMIN))
            wait_until(lambda: _may_ask(later), "the new token is good")
            assert not _may_ask(tenant)
            setup.tokens.write_text("broken: [")
            wait_until(
                lambda: _may_ask(later) and "cannot be used" in secured.log("router"),
                "the router complains of the broken file and goes on",
            )
        finally:
            setup.allow(tenant=(TENANT, Right.INFERENCE), admin=(ADMIN, Right.ADMIN))
        wait_until(lambda: _may_ask(tenant), "the first token is good again")


def _may_ask(client: Client) -> bool:
    try:
        client.complete([1] * 4, max_new_tokens=1)
    except (Unauthenticated, PermissionDenied):
        return False
    return True


def test_certificates_change_without_a_restart(secured: SecuredCluster) -> None:
    setup = secured.setup
    first = setup.authority.issue("first")
    other = Authority(setup.folder, "other")
    renewed, me = other.issue("renewed"), other.issue("me")
    believed = setup.authority.pem.read_bytes()
    kept = [path.read_bytes() for path in (setup.node.cert, setup.node.key)]
    pids = {role: secured.pid(role) for role in ("router", "prefill", "decode")}
    try:
        # As one goes over to another authority: first all believe both, then certificates change.
        setup.authority.pem.write_bytes(believed + other.pem.read_bytes())
        wait_until(lambda: _answers(secured, me), "the router believes the other authority, too")
        shutil.copy(renewed.key, setup.node.key)
        shutil.copy(renewed.cert, setup.node.cert)
        only_other = Tls(ca=other.pem, cert=me.cert, key=me.key)

        def shows_renewed() -> bool:
            with Client(secured.address, tls=only_other, token=ADMIN) as client:
                try:
                    return len(client.status().instances) == 2
                except Exception:
                    return False

        wait_until(shows_renewed, "the router shows the new certificate")
        secured.kill("prefill")
        secured.start("prefill")
        wait_until(lambda: _answers(secured, first), "answers come again", 60)
        assert secured.pid("router") == pids["router"]
        assert secured.pid("decode") == pids["decode"]
    finally:
        setup.node.cert.write_bytes(kept[0])
        setup.node.key.write_bytes(kept[1])
    secured.wait_idle()


def _answers(cluster: SecuredCluster, pair: Pair) -> bool:
    with cluster.client_of(TENANT, pair) as client:
        try:
            return len(client.complete([1] * 4, max_new_tokens=2, ignore_eos=True).token_ids) == 2
        except Exception:
            return False


def command(
    cluster: SecuredCluster, token: Path, *arguments: str
) -> "subprocess.CompletedProcess[str]":
    """Runs a command with certificate and token."""
    setup = cluster.setup
    files = ("--tls-ca", setup.authority.pem, "--tls-cert", setup.user.cert)
    more = (*files, "--tls-key", setup.user.key, "--router", cluster.address)
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments, *map(str, more)],
        cwd=ROOT,
        env={**os.environ, "TWINPOOL_TOKEN_FILE": str(token)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_commands_show_token_and_certificate(secured: SecuredCluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TENANT)
    done = command(secured, token, "generate", "--max-new-tokens", "1", "hi")
    assert done.returncode == 0, done.stderr
    refused = command(secured, token, "status")
    assert refused.returncode == 1
    assert "right 'admin'" in refused.stderr
    token.write_text(ADMIN)
    done = command(secured, token, "status")
    assert "prefill" in done.stdout, done.stderr


def test_instance_with_another_token_ends_and_says_why(
    secured: SecuredCluster, tmp_path: Path
) -> None:
    wrong = tmp_path / "worker"
    wrong.write_text(new_token())
    flags = [*secured.setup.flags(), "--worker-token-file", str(wrong)]
    process = subprocess.Popen(
        [sys.executable, "-m", "prefill", str(MODEL_DIR), "--router", secured.address, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == 1
    assert "the token is not known here" in output
