"""Tokens and certificates: who gets in, and what is refused before anything listens."""

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sockets import HELLO, WELCOME, Recorder, address_of, connecting, next_event, outcome, serving

from outrider.actors.grpc_client import DraftClient
from outrider.actors.grpc_server import DraftServer
from outrider.actors.io_thread import IoThread
from outrider.actors.security import Security
from outrider.actors.transport import Disconnected
from outrider.actors.wire import METHOD, SERVICE, encode_target
from outrider.speculation.errors import InvalidConfigError
from outrider.speculation.replication.messages import Welcome

TOKEN = "s3cret-token"
RIGHT = (("authorization", f"Bearer {TOKEN}"),)
WRONG = [
    (),
    (("authorization", "Bearer wrong"),),
    (("authorization", TOKEN),),
    (("authorization", f"Bearer {TOKEN}x"),),
    RIGHT * 2,
]
CALLS = [
    ("stream_stream", f"/{SERVICE}/{METHOD}", "OK"),
    ("unary_unary", "/grpc.health.v1.Health/Check", "OK"),
    ("stream_unary", "/outrider.v1.Drafting/Unknown", "UNIMPLEMENTED"),
    ("unary_stream", "/nobody.Knows/This", "UNIMPLEMENTED"),
]


@pytest.mark.parametrize(("kind", "method", "code"), CALLS)
def test_every_call_needs_the_token(io: IoThread, kind: str, method: str, code: str) -> None:
    frames = [encode_target(HELLO)] if method.endswith(METHOD) else []
    with serving(io, security=Security(token=TOKEN)) as server:
        address = address_of(server)
        assert outcome(io, address, *frames, kind=kind, method=method, metadata=RIGHT)[0].name == code
        for metadata in WRONG:
            ended, told = outcome(io, address, *frames, kind=kind, method=method, metadata=metadata)
            assert ended.name == "UNAUTHENTICATED"
            assert told == f"the cluster token is {'wrong' if metadata else 'missing'}"


def test_watching_the_health_needs_the_token(io: IoThread) -> None:
    with serving(io, security=Security(token=TOKEN)) as server:
        method = "/grpc.health.v1.Health/Watch"
        ended, _ = outcome(io, address_of(server), kind="unary_stream", method=method)
        assert ended.name == "UNAUTHENTICATED"


def test_a_target_gets_in_with_the_token_only(io: IoThread) -> None:
    with serving(io, security=Security(token=TOKEN)) as server:
        with connecting(io, security=Security(token=TOKEN)) as client:
            assert next_event(client, client.connect(address_of(server), HELLO), Welcome) == WELCOME
        with connecting(io) as client:
            lost = next_event(client, client.connect(address_of(server), HELLO), Disconnected)
            assert lost.reason == "UNAUTHENTICATED: the cluster token is missing"


def test_a_token_does_not_show() -> None:
    assert TOKEN not in repr(Security(token=TOKEN))


@pytest.mark.parametrize("token", ["", "with space", "new\nline", "ümlaut"])
def test_a_token_that_cannot_be_a_header_is_refused(token: str) -> None:
    with pytest.raises(InvalidConfigError, match="the cluster token must be printable ASCII"):
        Security(token=token)


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.ca = folder / "ca.pem"
        self._write(self.ca, self._sign("authority", self._key.public_key(), is_authority=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Files with a certificate for this machine, and with its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, key_file = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        self._write(certificate, self._sign(name, key.public_key(), is_authority=False))
        form, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
        key_file.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
        return certificate, key_file

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, *, is_authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        hour = datetime.timedelta(hours=1)
        local = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - hour)
            .not_valid_after(now + hour)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(local, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Security:
    """Of a worker that wants to see its targets' certificates."""
    certificate, key = authority.issue("worker")
    return Security(ca=authority.ca, certificate=certificate, key=key)


def test_certificates_of_one_authority_trust_each_other(
    io: IoThread, authority: Authority, mutual: Security
) -> None:
    certificate, key = authority.issue("target")
    security = Security(ca=authority.ca, certificate=certificate, key=key)
    with serving(io, security=mutual) as server, connecting(io, security=security) as client:
        assert next_event(client, client.connect(address_of(server), HELLO), Welcome) == WELCOME


def test_a_worker_without_an_authority_takes_any_target(io: IoThread, authority: Authority) -> None:
    certificate, key = authority.issue("worker-2")
    security = Security(ca=authority.ca)
    with (
        serving(io, security=Security(certificate=certificate, key=key)) as server,
        connecting(io, security=security) as client,
    ):
        assert next_event(client, client.connect(address_of(server), HELLO), Welcome) == WELCOME


def test_strangers_and_plaintext_do_not_get_in(
    io: IoThread, authority: Authority, mutual: Security, tmp_path: Path
) -> None:
    certificate, key = Authority(tmp_path).issue("stranger")
    recorder = Recorder()
    with serving(io, recorder, security=mutual) as server:
        for security in (
            Security(),
            Security(ca=authority.ca),
            Security(ca=authority.ca, certificate=certificate, key=key),
            Security(ca=tmp_path / "ca.pem"),
        ):
            with connecting(io, security=security) as client:
                lost = next_event(client, client.connect(address_of(server), HELLO), Disconnected)
                assert lost.reason.startswith(("UNAVAILABLE: ", "the draft worker did not answer"))
    assert recorder.heard.empty()


def test_a_target_that_wants_tls_does_not_take_plaintext(io: IoThread, mutual: Security) -> None:
    with serving(io) as server, connecting(io, security=mutual) as client:
        lost = next_event(client, client.connect(address_of(server), HELLO), Disconnected)
        assert lost.reason.startswith("UNAVAILABLE: ")


def test_a_certificate_goes_with_its_key() -> None:
    with pytest.raises(InvalidConfigError, match="the certificate some/file needs a key file"):
        Security(certificate=Path("some/file"))
    with pytest.raises(InvalidConfigError, match="the key some/file needs a certificate file"):
        Security(key=Path("some/file"))


def test_files_are_checked_by_name(mutual: Security, tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.pem", tmp_path / "empty.pem"
    empty.write_text("nothing")
    with pytest.raises(InvalidConfigError, match=r"cannot read .*missing\.pem: No such file"):
        DraftClient(security=Security(ca=missing))
    with pytest.raises(InvalidConfigError, match=r"empty\.pem is not a PEM file"):
        DraftClient(security=Security(ca=empty))
    with pytest.raises(InvalidConfigError, match=r"cannot read .*missing\.pem"):
        DraftServer(WELCOME, Recorder(), security=Security(certificate=missing, key=mutual.key))
    with pytest.raises(InvalidConfigError, match=r"a server with the authority .*ca\.pem needs a cert"):
        DraftServer(WELCOME, Recorder(), security=Security(ca=mutual.ca))


def test_a_key_of_another_certificate_is_refused(
    io: IoThread, authority: Authority, mutual: Security
) -> None:
    _, key = authority.issue("other")
    security = Security(certificate=mutual.certificate, key=key)
    with pytest.raises(InvalidConfigError), serving(io, security=security):
        pass


def test_credentials_are_only_made_when_there_are_files() -> None:
    assert Security().channel_credentials() is None
    assert Security(token=TOKEN).server_credentials() is None
