r"""One system and one case in a process of its own, run when the parent says so.

The parent writes a line of JSON, {"system": ..., "device": ..., "case": ..., "kind": ...}, then
"run" as often as it likes; each line is answered by one. The process ends with its input.
"""

import contextlib
import json
import resource
import sys
from typing import Any

from benchmarks.cases import Case, Decode, Model, Prepared, Train, Unable


def _case(kind: str, fields: dict[str, Any]) -> Case:
    model = Model(**fields.pop("model"))
    return Train(model, **fields) if kind == "Train" else Decode(model, **fields)


def prepare(system: str, case: Case, device: str) -> Prepared:
    """The system's own `prepare`; each is imported only where it is wanted."""
    if system == "gothic_jax":
        from benchmarks import gothic

        return gothic.prepare(case, device=device)
    if system == "llama.cpp":
        from benchmarks import llama_cpp

        return llama_cpp.prepare(case)
    from benchmarks import pytorch

    variants: dict[str, pytorch.Variant] = {
        "PyTorch eager": "eager",
        "PyTorch compile": "compile",
        "Transformers": "transformers",
    }
    return pytorch.prepare(case, device=device, variant=variants[system])


def main() -> None:
    """Answers the parent's lines on the real stdout; whatever else is printed goes to stderr."""
    answers = sys.stdout

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        order = json.loads(sys.stdin.readline())
        try:
            case = _case(order["kind"], order["case"])
            prepared = prepare(order["system"], case, order["device"])
        except Unable as reason:
            answer({"unable": str(reason)})
            return
        answer(prepared.facts)
        for _ in sys.stdin:
            # While others had their turn, the caches and some pages of this process went cold.
            prepared.run()
            answer(prepared.run() | {"peak_bytes": _peak_bytes(order["system"], prepared)})


def _peak_bytes(system: str, prepared: Prepared) -> float:
    if system == "gothic_jax":
        from benchmarks import gothic

        return gothic.peak_bytes()
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return prepared.facts.get("peak_bytes", here)


if __name__ == "__main__":
    main()
