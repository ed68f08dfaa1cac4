"""The short form of `make fuzz`: broken files through every reader of common/ are read, or refused in one
line.
"""

import warnings

from bench import fuzz


def test_broken_files_are_read_or_refused(tmp_path):
    findings = []

    def tell(place: int, target: str, number: int, end: str, detail: str) -> None:
        if end not in ("read", "refused"):
            findings.append(f"--only '{target}' --at {number}: {end}\n{detail}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = fuzz.fuzz(tmp_path, 800, tell=tell)
    assert not findings, "\n\n".join(findings)
    assert ends["read"] + ends["refused"] == 800 and ends["read"] > 80 and ends["refused"] > 400
