"""What people read before they approve."""

from __future__ import annotations

from tests.rollout_world import make_release
from tests.serving_world import make_channel

from trainyard.documents.measurement import Check, GateVerdict
from trainyard.reports.approval import approval_request, plain


def test_it_has_the_verdicts_with_their_figures() -> None:
    verdict = GateVerdict(
        gate="accuracy",
        plan_id="p",
        target="cpu",
        measurement_id="m",
        outcome="warn",
        checks=(
            Check(what="sums exact_match", observed=0.91, bound=">= 0.9", outcome="pass"),
            Check(what="a|b", observed=None, bound="<= 1", outcome="skipped"),
        ),
        summary="It is *just* enough.",
    )
    release = make_release("b")
    text = approval_request(
        release,
        make_channel(),
        [verdict],
        requested_by="ada",
        reason="[click](http://evil)",
        needs=2,
        page="https://airflow.example/plugin/trainyard/trainyard",
    )
    assert "**Accuracy gate: ⚠ warn.** It is \\*just\\* enough\\." in text
    assert "| sums exact\\_match | 0\\.91 | \\>\\= 0\\.9 | ✓ pass |".replace("\\=", "=") in text
    assert "| a\\|b | - | \\<= 1 | - skipped |" in text
    assert "2 people have to approve" in text
    assert "ada: \\[click\\]\\(http://evil\\)" in text
    assert f"/releases/{release.model}/{release.release_id})" in text


def test_without_verdicts_it_says_so() -> None:
    text = approval_request(
        make_release("b"), make_channel(), [], requested_by="", reason="", needs=1, page="/page"
    )
    assert "No verdict of a gate is on record." in text
    assert "Asked for by a schedule" in text
    assert "1 person has to approve" in text


def test_text_of_others_stays_on_its_line() -> None:
    assert plain("a\n# b <img>") == "a \\# b \\<img\\>"
