"""Transcripts of `trainyard doctor neuron` in the store, and what they prove.

Whoever can write to the store could write a transcript; so each counts only if a trusted key
signed it, and one that does not is as if it were not there, with the reason told.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from trainyard.documents.proof import Proof, payload_of_proof, proof_of_payload
from trainyard.errors import BadInput, Conflict, CorruptFile, NotFound
from trainyard.settings import Settings
from trainyard.signing.envelope import open_envelope, seal
from trainyard.signing.keys import SigningKey, trusted_keys
from trainyard.signing.trust import TrustedKeys
from trainyard.spec.model import Target
from trainyard.store.layout import PROOFS, proof_key
from trainyard.store.protocol import Store


@dataclass(frozen=True)
class Proofs:
    """What was proven on devices, as far as trusted keys say so."""

    proofs: tuple[Proof, ...]
    """Newest first."""
    ignored: tuple[str, ...] = ()
    """Sentences about transcripts that do not count."""

    def of(self, target: Target) -> Proof | None:
        """Return the newest proof for a target's image, instance and lane, if there is one.

        A later transcript that failed takes the proof away.
        """
        image = target.neuron.image if target.neuron else ""
        return self.find(image, target.instance, target.lane)

    def find(self, image: str, instance: str, lane: str) -> Proof | None:
        """As `of`, by name."""
        triple = (image, instance, lane)
        newest = next((each for each in self.proofs if each.triple == triple), None)
        return newest if newest is not None and newest.proven else None


def store_proof(store: Store, proof: Proof, key: SigningKey) -> str:
    """Sign and store a transcript, and return its key. One that is there stays.

    Raises:
        BadInput, Transient: it cannot be signed, or the store not be written.
    """
    place = proof_key(proof.lane, proof.instance, proof.proof_id)
    # A conflict is the same transcript: its id is made of what was seen and when.
    with contextlib.suppress(Conflict):
        store.create(place, seal(payload_of_proof(proof), key))
    return place


def read_proof(data: bytes, key: str, trusted: TrustedKeys) -> Proof:
    """Return the transcript in an envelope.

    Raises:
        BadInput: no trusted key signed it.
        CorruptFile: it is none, or lies in another's place.
    """
    opened = open_envelope(data, key, trusted)
    try:
        proof = proof_of_payload(opened.payload)
    except ValueError as error:
        raise CorruptFile(f"{key} states no transcript: {error}") from error
    if proof_key(proof.lane, proof.instance, proof.proof_id) != key:
        raise CorruptFile(f"{key} is a copy of another transcript.")
    return proof


def read_proofs(store: Store, settings: Settings) -> Proofs:
    """Return all transcripts that a trusted key signed.

    Raises:
        Transient: the store cannot be read.
    """
    trusted = trusted_keys(settings)
    found: list[Proof] = []
    ignored: list[str] = []
    for entry in store.list(f"{PROOFS}/"):
        try:
            found.append(read_proof(store.read(entry.key).data, entry.key, trusted))
        except NotFound:
            continue
        except BadInput as error:
            ignored.append(f"{entry.key} does not count: {error.message}")
    return Proofs(tuple(sorted(found, key=_age)), tuple(ignored))


def _age(proof: Proof) -> tuple[float, str]:
    return -proof.created_at.timestamp(), proof.proof_id
