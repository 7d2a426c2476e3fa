"""Agreement with recorded verdicts, side by side: the graders here, plain Math-Verify, and lm-evaluation-harness's extraction.

    python benchmarks/agreement.py --data DIR [--json]

DIR holds `graded/*.jsonl` (rows with `gold`, `response`, `correct`; rows with `suspect` are left out). Plain Math-Verify is
`verify(parse(gold), parse(response))` with its defaults, the gold as a formula. Of lm-evaluation-harness 0.4.13 the regular
expressions of its tasks stand below with their names; its answers are compared as its `exact_match` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from undo_ray import regrade

FILES = {
    "gsm8k_openai_samples": "gsm8k",
    "gsm8k_rho_cot": "gsm8k",
    "gsm8k_rho_tora": "gsm8k",
    "math500_rho_cot": "math",
    "math500_rho_tora": "math",
    "math_qwen25_cot": "math",
    "math_answer_pairs": "math",
    "math_verify_cases": "math",
    "hendrycks_equiv_cases": "math",
    "mmlu_pro_samples": "mmlu_pro",
    "theoremqa_samples": "theoremqa",
}
# gsm8k-cot-zeroshot.yaml (strict-match, flexible-extract) and mmlu_pro/_default_template_yaml (custom-extract).
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LETTER = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    table: dict[str, dict[str, float]] = {}
    for name, task in FILES.items():
        path = Path(options.data) / "graded" / f"{name}.jsonl"
        rows = list(map(json.loads, filter(None, path.read_text(encoding="utf-8").split("\n"))))
        # Where the recording extracted nothing there is no verdict on an answer to compare with.
        rows = [row for row in rows if not row.get("suspect") and (task != "mmlu_pro" or row["pred"] is not None)]
        others: dict[str, Callable[[Any], bool]] = {"Math-Verify": _math_verify}
        if task == "gsm8k":
            others |= {"lm-eval strict": _strict, "lm-eval flexible": _flexible}
        if task == "mmlu_pro":
            others = {"lm-eval custom-extract": _letter}
        table[name] = {"rows": len(rows), "here": _here(task, rows, path)}
        table[name] |= {who: sum(f(row) == row["correct"] for row in rows) / len(rows) for who, f in others.items()}
    if options.json:
        print(json.dumps(table, indent=2))
        return
    for name, figures in table.items():
        print(
            f"{name:22}", "  ".join(f"{who} {value:.4f}" if who != "rows" else f"n {value:4}" for who, value in figures.items())
        )


def _here(task: str, rows: list[dict[str, Any]], path: Path) -> float:
    _, disagreements = regrade.regrade(task, str(path))
    kept = {(row.get("question_id"), row["response"][-300:]) for row in rows}
    return 1 - sum((row["question"], row["response"]) in kept for row in disagreements) / len(rows)


def _math_verify(row: dict[str, Any]) -> bool:
    from math_verify import parse, verify

    bare = row["source"].endswith("(extracted answer)")
    gold = row["gold"] if "$" in row["gold"] or "\\boxed" in row["gold"] else f"${row['gold']}$"
    return bool(verify(parse(gold), parse(f"${row['response']}$" if bare else row["response"])))


def _exact(found: str | None, gold: str) -> bool:
    plain = [re.sub(r",|\$|\.$", "", text).lower() for text in (found or "[invalid]", gold)]
    return plain[0] == plain[1]


def _strict(row: dict[str, Any]) -> bool:
    found = STRICT.findall(row["response"])
    return _exact(found[0] if found else None, row["gold"])


def _flexible(row: dict[str, Any]) -> bool:
    found = FLEXIBLE.findall(row["response"])
    return _exact(next(filter(None, found[-1])) if found else None, row["gold"])


def _letter(row: dict[str, Any]) -> bool:
    found = LETTER.findall(row["response"])
    return bool(found) and found[0] == row["gold"]


if __name__ == "__main__":
    main()
