"""Who may talk to whom: a pair of keys and certificates, of the secure side and of its workers.

Each party's certificate is signed by itself and known to the other, which takes it and no other one: there is no
authority, no host name and no date that matters. Both halves of a pair are made at once. Several workers may share the
workers' half: any of them is the untrusted party.
"""

import os
import secrets
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scx.files.private import read_private, write_new_private

__all__ = ["Credentials"]

Role = Literal["secure side", "worker"]

_USAGES: dict[Role, x509.ObjectIdentifier] = {
    "secure side": ExtendedKeyUsageOID.SERVER_AUTH,
    "worker": ExtendedKeyUsageOID.CLIENT_AUTH,
}
_MAX_FILE_BYTES = 2**16
_REMEDY = "`python -m scx pair DIRECTORY` makes a pair"
# A certificate is as good as it is kept, whatever a clock says: RFC 5280's way to say that it has no end.
_BEGIN, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class Credentials:
    """One half of a pair: this party's key and certificate, and the other's certificate.

    They are neither pickled nor copied, and show no key.
    """

    __slots__ = ("_certificate", "_context", "_key", "_other")

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, other: x509.Certificate) -> None:
        roles = {_role(certificate), _role(other)}
        if key.public_key() != certificate.public_key() or roles != set(_USAGES):
            raise ValueError("credentials: expected a key, its certificate, and that of the other party")
        self._key = key
        self._certificate = certificate
        self._other = other
        self._context = self._make_context()

    @classmethod
    def generate(cls) -> tuple["Credentials", "Credentials"]:
        """A fresh pair: (the secure side's, the workers')."""
        secure, worker = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        of_secure, of_worker = _certify(secure, "secure side"), _certify(worker, "worker")
        return cls(secure, of_secure, of_worker), cls(worker, of_worker, of_secure)

    @property
    def role(self) -> Role:
        """Whose half this is."""
        return _role(self._certificate)

    def check(self, role: Role) -> None:
        """Raises ValueError if this is the other party's half."""
        if self.role != role:
            raise ValueError(f"credentials: expected those of the {role}, got those of the {self.role}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a new file that its owner alone may read (PEM, mode 0600).

        Raises: FileExistsError for a file that is there.
        """
        certificates = [x.public_bytes(Encoding.PEM) for x in (self._certificate, self._other)]
        write_new_private(path, b"".join((self._key_pem(NoEncryption()), *certificates)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Credentials":
        """Read what `save` wrote.

        Raises: PermissionError for a file that others than its owner may read or write, or that is neither this user's
            nor root's; ValueError for one that holds something else, or is no regular file; OSError if it cannot be
            read.
        """
        held = _read_pem(read_private(path, "credentials", _REMEDY, _MAX_FILE_BYTES))
        if held is None:
            raise ValueError(f"credentials: {path} does not hold a key, its certificate and that of the other party")
        return cls(*held)

    def open(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> ssl.SSLObject:
        """This party's end of a TLS connection, before the handshake."""
        return self._context.wrap_bio(incoming, outgoing, server_side=self.role == "secure side")

    def expects(self, certificate: bytes | None) -> bool:
        """Whether this is the other party's certificate, in DER."""
        return certificate == self._other.public_bytes(Encoding.DER)

    def __repr__(self) -> str:
        return f"Credentials({self.role})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("credentials are neither pickled nor copied: save them to a file of their owner's")

    def _key_pem(self, encryption: KeySerializationEncryption) -> bytes:
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def _make_context(self) -> ssl.SSLContext:
        is_server = self.role == "secure side"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the other is known by its certificate, wherever it is
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self._other.public_bytes(Encoding.PEM).decode())
        if is_server:
            context.num_tickets = 0  # no session is taken up again without a certificate
        # ssl reads keys from files alone: this one is enciphered, under a password that nobody else ever has.
        password = secrets.token_bytes(32).hex().encode()
        with tempfile.TemporaryDirectory() as private:
            path = Path(private, "key.pem")
            path.touch(0o600)
            path.write_bytes(
                self._key_pem(BestAvailableEncryption(password)) + self._certificate.public_bytes(Encoding.PEM)
            )
            context.load_cert_chain(path, password=lambda: password)
        return context


def _read_pem(pem: bytearray) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate, x509.Certificate] | None:
    """A key and two certificates. None for anything else: no error has the file's bytes with it."""
    try:
        key = load_pem_private_key(pem, password=None)
        certificate, other = x509.load_pem_x509_certificates(bytes(pem))  # it takes nothing else
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return None
    return (key, certificate, other) if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _certify(key: ec.EllipticCurvePrivateKey, role: Role) -> x509.Certificate:
    """A party's certificate, signed by itself."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"SCX {role}")])
    return (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), _BEGIN, _END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGES[role]]), critical=True)
        .sign(key, hashes.SHA256())
    )


def _role(certificate: x509.Certificate) -> Role:
    """Whose certificate this is. Raises ValueError for any other."""
    try:
        usage = list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, x509.ExtensionNotFound):
        usage = []
    for role, expected in _USAGES.items():
        if usage == [expected]:
            return role
    raise ValueError("credentials: expected the certificates of a secure side and of a worker")
