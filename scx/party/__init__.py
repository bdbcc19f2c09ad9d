"""Who runs where: a secure and an untrusted party, and the boundary between them."""

from scx.files import load_shared_keys, save_shared_keys
from scx.keys import SharedKeys
from scx.party.boundary import MESSAGES, Boundary, PartyLostError, Transcript
from scx.party.cache import SplitCache
from scx.party.integrity import IntegrityError
from scx.party.plan import Plan
from scx.party.secure import SecureParty
from scx.party.untrusted import UntrustedParty

__all__ = [
    "MESSAGES",
    "Boundary",
    "IntegrityError",
    "PartyLostError",
    "Plan",
    "SecureParty",
    "SharedKeys",
    "SplitCache",
    "Transcript",
    "UntrustedParty",
    "load_shared_keys",
    "save_shared_keys",
]
