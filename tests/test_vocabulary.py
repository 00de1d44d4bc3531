"""Text and code use the field's own words, in American spelling."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".pyi", ".md", ".toml", ".html", ".css", ".js"}
RECORDED = re.compile(r"^benchmarks/.*/results/.*(?<!README\.md)$")

# A pattern, and the word to use instead.
OLD_WORDS = {
    r"adaptors?": "adapter",
    r"neighbou?r(s|ing)?": "related method, or adjacent",
    r"(method'?s )?(?<!model[\s_])cards?": "method page",  # Hugging Face has model cards
    r"(tell|tells|told|telling)( \w+){0,3} apart": "statistically indistinguishable, or separate",
    r"told from (each|one|the|an)\s?other(s)?": "statistically indistinguishable",
    r"in small(?=\s?[,:;(*]|\.(\s|$))": "scaled-down",
    r"renew(s|ed|ing|al)?|anew": "recalibrate, or again",
    r"batch[- ]norms?(?!_)": "BatchNorm",
    r"whiten(s|ed|ing)?(?!-)": "activation-aware",
    r"(know|knows|mind|minds) the data": "activation-aware",
    r"ghosts?": "meta copy",
    r"rehears(al|als|e|es|ed)": "dry run",
    r"(named|logging|unknown) hosts?": "logging backend",
    r"rungs?": "API level",
    r"rank health": "rank metrics",
    r"planes": "cost-quality plots",
    r"(at|from|to|for) (the|this|that|one|any|each|every|a|several|some|which) moments?": "time",
    r"moments? (of|for) (inflation|deflation|change|a change)": "transition point",
    r"moments (by|set by) hand|published moments|moments found|finds? \w+ moments": "time",
    r"themselves find|find themselves|choose themselves": "automatic",
    r"dearer|dearest": "more expensive",
    r"per cent": "percent",
    r"flaw|unfit_reason": "unsupported_reason",
    r"refill": "set_weight_",
}
BRITISH = (
    r"\w*(regulari|initiali|normali|optimi|seriali|summari|factori|generali|quanti|standardi|"
    r"minimi|maximi|organi|recogni|reali|penali|parallel[i]|vectori|tokeni|discreti|equali|"
    r"orthogonali|parametri|randomi|stabili|utili|visuali|speciali|locali|categori|emphasi)"
    r"s(e|es|ed|er|ers|ing|ation|ations|able)",
    r"analys(e|es|ed|ing)",
    r"(un)?(colour|behaviour|favour|honour|labour|neighbour|flavour|endeavour)\w*",
    r"(centre|metre|fibre|litre)s?",
    r"(un)?(label|model|cancel|travel|signal|channel|level|total|parallel)l(ed|ing)",
    r"learnt|spelt|burnt|whilst|amongst|grey|artefacts?|programmes?|licences?|defences?|judgements?",
)
# A file (or folder) and a word that is right there.
ALLOWED = [
    ("tests/test_vocabulary.py", r".*"),
    ("benchmarks/training/results/2026-11-24-low-rank-ending/README.md", r"whitened"),
    ("docs/methods/activation-aware-truncation.md", r"whitening"),  # SVD-LLM's own word
    ("tests/monitors/test_calibration.py", r"whitening"),
    ("benchmarks/training/results/2026-11-24-after-a-change/README.md", r"renew"),
    # The names in the records.
    ("benchmarks/claims/methods_activation_aware_truncation.py", r"whitened"),
    ("benchmarks/claims/methods_rewarmup_and_recalibration.py", r"renew"),
]


def texts() -> list[str]:
    """Every tracked text file, but for recorded results."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    names = listed.stdout.splitlines()
    return [n for n in names if Path(n).suffix in SUFFIXES and not RECORDED.match(n)]


def allowed(name: str, word: str) -> bool:
    return any(
        name.startswith(place) and re.fullmatch(right, word, re.IGNORECASE)
        for place, right in ALLOWED
    )


def found(pattern: str) -> list[str]:
    """Where a word stands, whatever line breaks are in it; ``_`` and digits end a word too."""
    expression = re.compile(
        rf"(?<![^\W\d_])({pattern.replace(' ', chr(92) + 's+')})(?![^\W\d_])", re.IGNORECASE
    )
    hits: list[str] = []
    for name in texts():
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for match in expression.finditer(text):
            if not allowed(name, match[0]):
                line = text.count("\n", 0, match.start()) + 1
                hits.append(f"{name}:{line}: {' '.join(match[0].split())}")
    return hits


@pytest.mark.parametrize("pattern", OLD_WORDS)
def test_no_old_word_is_left(pattern: str) -> None:
    hits = found(pattern)
    assert not hits, f"use {OLD_WORDS[pattern]!r}:\n" + "\n".join(hits)


@pytest.mark.parametrize("pattern", BRITISH)
def test_spelling_is_american(pattern: str) -> None:
    hits = found(pattern)
    assert not hits, "American spelling:\n" + "\n".join(hits)
