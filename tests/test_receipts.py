import json
import os
from pathlib import Path

import pytest

from gothic_jax.commands.chat import main
from gothic_jax.measuring.novelty import Novelty, build
from gothic_jax.writing.ranking import Ranked, best_first
from tests.common import Workplace


def lines(trained: Workplace) -> list[dict]:
    content = (trained.out_dir / "samples.jsonl").read_text()
    return [json.loads(line) for line in content.splitlines()]


def chat(trained: Workplace, *flags: str) -> int:
    return main(["--checkpoint", f"{trained.out_dir}/best", "--max-tokens", "12", *flags])


@pytest.mark.parametrize(
    "flags",
    [
        ["--voice", "wilde"],
        ["--blend", "wilde=1.5,lovecraft=-0.5", "--num-samples", "3"],
        ["--temperature", "1.3", "--top-k", "0", "--top-p", "1"],
    ],
)
def test_each_sample_can_be_had_again(
    trained: Workplace, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    (trained.out_dir / "samples.jsonl").unlink(missing_ok=True)
    assert chat(trained, "--prompt", "There are doors", *flags) == 0
    capsys.readouterr()
    written = lines(trained)
    path = trained.out_dir / "samples.jsonl"
    for number, receipt in enumerate(written, start=1):
        assert receipt["sample"] == number
        assert main(["--replay", f"{path}:{number}"]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"There are doors{receipt['text']}\n"
        assert "the same text" in captured.err
    assert len({receipt["text"] for receipt in written}) == len(written)
    assert main(["--replay", str(path)]) == 0  # the last one
    assert capsys.readouterr().out == f"There are doors{written[-1]['text']}\n"
    assert lines(trained) == written  # a replay leaves no receipt


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_replay_computes_in_the_type_of_the_receipt(
    trained: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("gothic_jax.writing.writer.decoding_dtype", lambda _: dtype)
        assert chat(trained, "--temperature", "1.5", "--top-k", "0", "--max-tokens", "60") == 0
    assert lines(trained)[-1]["dtype"] == dtype
    assert main(["--replay", str(trained.out_dir / "samples.jsonl")]) == 0
    assert "the same text" in capsys.readouterr().err


def test_a_prompt_gets_the_typography_of_the_training_text(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.out_dir / "samples.jsonl").unlink(missing_ok=True)
    straight, curly = 'He said: "There are doors', "He said: “There are doors "
    outs = []
    for flags in (["--prompt", straight], ["--prompt", curly], ["--prompt", curly, "--raw-prompt"]):
        assert chat(trained, "--seed", "3", *flags) == 0
        captured = capsys.readouterr()
        outs.append(captured.out)
        assert ("--raw-prompt leaves it" in captured.err) == (flags == ["--prompt", curly])
    assert outs[0] == outs[1]
    assert outs[2].startswith(curly)
    written = lines(trained)
    assert [receipt["prompt"] for receipt in written] == [straight, straight, curly]
    assert [receipt["given_prompt"] for receipt in written] == [None, curly, None]
    path = trained.out_dir / "samples.jsonl"
    # Older receipts have no such field.
    older = {name: value for name, value in written[1].items() if name != "given_prompt"}
    path.write_text(f"{path.read_text()}{json.dumps(older)}\n")
    for number in range(1, 5):
        assert main(["--replay", f"{path}:{number}"]) == 0
        assert "the same text" in capsys.readouterr().err


def test_the_best_of_several_is_the_one_with_a_receipt(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained.train("--resume", max_iters=7) == 0  # with the text of this folder
    build(trained.root / "mixed_train.txt", None)
    capsys.readouterr()
    (trained.out_dir / "samples.jsonl").unlink(missing_ok=True)
    where = ["--checkpoint", f"{trained.out_dir}/latest", "--max-tokens", "30"]
    flags = ["--best-of", "4", "--voice", "wilde", "--temperature", "2", "--seed", "1"]
    assert main([*where, *flags]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()[1:5]]
    assert sorted(int(row[0]) for row in table) == [1, 2, 3, 4]
    (receipt,) = lines(trained)
    assert receipt["sample"] == int(table[0][0])
    assert f"--- {table[0][0]} of 4 ---" in out
    assert main(["--replay", str(trained.out_dir / "samples.jsonl")]) == 0


def test_the_best_copies_least_and_is_then_nearest_in_style() -> None:
    def novelty(words: int, copied: float) -> Novelty:
        return Novelty(words, None, [], copied, [])

    measured = [novelty(0, 0.0), novelty(9, 0.5), novelty(9, 0.0), novelty(9, 0.0)]
    samples = map(Ranked, range(4), measured, [0.0, 3.0, -0.5, 0.5])
    assert [sample.number for sample in best_first([*samples])] == [3, 2, 1, 0]


def test_a_text_that_comes_out_otherwise_is_told_with_what_differs(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(trained, "--seed", "4") == 0
    path = trained.out_dir / "samples.jsonl"
    receipt = lines(trained)[-1]
    facts = receipt["circumstances"]
    for change, told in (
        ({"seed": 5}, "has it been edited?"),
        ({"seed": 5, "circumstances": facts | {"checkpoint": "0" * 64}}, "checkpoint 000"),
        ({"seed": 5, "circumstances": facts | {"device": "gpu (X)"}}, "device gpu (X) ->"),
        ({"seed": 5, "circumstances": facts | {"jax": "0.1"}}, "jax 0.1 ->"),
    ):
        path.write_text(json.dumps(receipt | change))
        capsys.readouterr()
        assert main(["--replay", str(path)]) == 1
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"text": 1},
        {"max_tokens": 0},
        {"max_tokens": 2**40},
        {"seed": -1},
        {"sample": 2},
        {"samples": 0},
        {"blend": {"poe": 1.0}},
        {"blend": {"wilde": "much"}},
        {"blend": {"wilde": float("nan")}},
        {"blend": [1]},
        {"sampling": {"temperature": 0.8, "top_k": 2.5, "top_p": 0.9}},
        {"sampling": {"temperature": -1, "top_k": 2, "top_p": 0.9}},
        {"sampling": {"temperature": 10**400, "top_k": 2, "top_p": 0.9}},
        {"sampling": {"temperature": True, "top_k": 2, "top_p": 0.9}},
        {"sampling": {}},
        {"samples": 2**32 - 1},
        {"blend": {"wilde": 0}},
        {"circumstances": {"jax": 1}},
        {"iteration": 77},
        {"dtype": "float16"},
        {"prompt": ""},
        {"prompt": "\ud800"},
        {"more": 1},
    ],
)
def test_a_receipt_that_cannot_be_followed_is_told_in_one_line(
    trained: Workplace, capsys: pytest.CaptureFixture[str], change: dict
) -> None:
    assert chat(trained, "--seed", "4") == 0
    path = trained.out_dir / "samples.jsonl"
    path.write_text(json.dumps(lines(trained)[-1] | change))
    capsys.readouterr()
    assert main(["--replay", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "[" * 100_000, "\x00\xff"])
def test_what_is_no_receipt_is_told_in_one_line(
    trained: Workplace, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = trained.out_dir / "samples.jsonl"
    path.write_text(content)
    for name in (str(path), f"{path}:2", f"{path}.not"):
        assert main(["--replay", name]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


def test_a_line_that_a_full_disk_cut_off_spoils_no_other(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained.out_dir / "samples.jsonl"
    path.write_text('{"text": "half of a rec')
    assert chat(trained, "--seed", "4") == 0
    capsys.readouterr()
    assert main(["--replay", f"{path}:1"]) == 2
    assert main(["--replay", f"{path}:2"]) == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_keeps_no_receipts_and_says_so(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.out_dir / "samples.jsonl").unlink(missing_ok=True)
    trained.out_dir.chmod(0o500)
    assert chat(trained) == 0
    assert "no receipts are kept" in capsys.readouterr().err


def test_a_chat_goes_on_where_receipts_cannot_be_written(
    trained: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.out_dir / "samples.jsonl").unlink(missing_ok=True)
    Path(trained.out_dir / "samples.jsonl").mkdir()
    assert chat(trained) == 0
    assert "no receipts are kept" in capsys.readouterr().err
