"""The teacher in this process: batches that change no answer, faults that reach their own row, a quick end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mtgdm.domain import Message
from mtgdm.errors import SettingError, UserError
from mtgdm.rows import Row, row_id
from mtgdm.student.noise import quiet
from mtgdm.teachers import transformers as backend
from mtgdm.teachers.seam import Completion, Options, Refused, TeacherSettings, Unavailable
from mtgdm.teachers.transformers import Transformers
from tests import teacher_domain
from tests.conftest import CommandLine, clean_environment, read_rows, write_lines
from tests.teacher_domain import Gardens, run_teacher, write_prompts
from tests.tiny_student import make_base

with quiet():
    import torch

    from mtgdm.student import base, generation, sampling

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GREETINGS = [
    "你好",
    "西湖在哪里？西湖始建于1089年，在杭州市。",
    "请说：山。",
    "灵隐寺的门票是30元，" * 6,
    "路",
]


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A random model, whose answers are noise without an end."""
    return make_base(tmp_path / "base")


def settings(model: str | Path = base.TINY, **more: Any) -> TeacherSettings:
    given = {"backend": "transformers", "model": str(model), "device_mode": "cpu", "concurrency": 8, **more}
    return TeacherSettings(**given)


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def options(text: str, **more: Any) -> Options:
    messages = asked(text)
    row = Row(row_id(messages), messages, {}, Path("rows.jsonl"), 1)
    given = {"temperature": 1.0, "top_p": 0.95, "seed": 42, "max_tokens": 24, **more}
    return Options(**given, row=row)


def ask(
    texts: Sequence[str], *, chosen: TeacherSettings | None = None, **more: Any
) -> list[Completion | BaseException]:
    """What comes back for texts that are asked at once."""

    async def together() -> list[Completion | BaseException]:
        async with Transformers(chosen or settings(), Gardens()) as teacher:
            asking = [teacher.answer(asked(text), None, options(text, **more)) for text in texts]
            return list(await asyncio.gather(*asking, return_exceptions=True))

    return asyncio.run(together())


def answers(texts: Sequence[str], **more: Any) -> list[Completion]:
    found = ask(texts, **more)
    assert all(isinstance(one, Completion) for one in found), found
    return [one for one in found if isinstance(one, Completion)]


def without_time(completions: Sequence[Completion]) -> list[tuple[Any, ...]]:
    return [(one.text, one.finish_reason, one.prompt_tokens, one.output_tokens) for one in completions]


# --- answers -------------------------------------------------------------------------------------


def test_a_row_says_the_same_alone_and_among_others() -> None:
    together = answers(GREETINGS, temperature=1.5)
    alone = [answers([text], temperature=1.5)[0] for text in GREETINGS]
    assert without_time(together) == without_time(alone)
    assert len({one.text for one in together}) == len(GREETINGS)


def test_another_seed_draws_other_words_and_the_same_seed_the_same() -> None:
    first, again, other = (answers(GREETINGS, seed=seed, temperature=2.0) for seed in (1, 1, 2))
    assert without_time(first) == without_time(again)
    assert without_time(first) != without_time(other)


def test_temperature_0_takes_the_likeliest_tokens_whatever_the_seed() -> None:
    with quiet():
        place = base.place("cpu")
        source = base.locate(base.TINY, Path())
        model = generation.load(source, base.TINY, place, workspace=Path(), load_in_4bit=False)
        chat = generation.load_chat(source, base.TINY, Path())
        prompts = [chat.prompt(asked(text)) for text in GREETINGS]
        greedy = dict(
            pair
            for batch in generation.answers(model, chat, prompts, batch=8, max_new_tokens=24)
            for pair in batch
        )
    for seed in (1, 2):
        said = answers(GREETINGS, temperature=0.0, seed=seed)
        assert [one.text for one in said] == [greedy[place].text for place in range(len(GREETINGS))]
        assert [one.finish_reason for one in said] == [
            greedy[place].finish_reason for place in range(len(GREETINGS))
        ]


def test_a_row_that_ends_early_does_not_wait_for_its_batch(base_folder: Path) -> None:
    order: list[str] = []

    async def together() -> tuple[Completion, Completion]:
        async with Transformers(settings(base_folder), Gardens()) as teacher:

            async def one(text: str, max_tokens: int) -> Completion:
                found = await teacher.answer(asked(text), None, options(text, max_tokens=max_tokens))
                order.append(text)
                return found

            return await asyncio.gather(one("长", 120), one("短", 3))

    long, short = asyncio.run(together())
    assert order == ["短", "长"]
    assert (short.finish_reason, short.output_tokens) == ("length", 3)
    assert long.output_tokens is not None and long.output_tokens > 3
    assert 0 < short.seconds < long.seconds


def test_what_waits_is_one_batch_and_no_larger_than_asked_for(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = spied(monkeypatch)
    answers([f"第{number}问" for number in range(7)], chosen=settings(base_folder, concurrency=8))
    assert sizes == [7]
    sizes.clear()
    answers([f"第{number}问" for number in range(7)], chosen=settings(base_folder, concurrency=3))
    assert sizes == [3, 3, 1]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches from here on."""
    sizes: list[int] = []
    before = sampling.sample

    def noted(model: Any, chat: Any, prompts: Any, *rest: Any, **more: Any) -> None:
        sizes.append(len(prompts))
        before(model, chat, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", noted)
    return sizes


def test_weights_in_4_bit_answer_on_a_cpu_and_are_another_teacher() -> None:
    found = answers(GREETINGS[:2], chosen=settings(load_in_4bit=True))
    assert all(one.output_tokens for one in found)
    four_bit = Transformers(settings(load_in_4bit=True), Gardens()).fingerprint
    assert four_bit != Transformers(settings(), Gardens()).fingerprint


def test_a_student_may_teach(tmp_path: Path) -> None:
    with quiet():
        from peft import LoraConfig, get_peft_model

        source, place = base.locate(base.TINY, tmp_path), base.place("cpu")
        model = generation.load(source, base.TINY, place, workspace=tmp_path, load_in_4bit=False)
        noise = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_alpha=64)
        get_peft_model(model, noise).save_pretrained(str(tmp_path / "student"))
    of_base = answers(["你好"], temperature=0.0)[0]
    of_student = answers(["你好"], chosen=settings(tmp_path / "student"), temperature=0.0)[0]
    assert of_student.prompt_tokens == of_base.prompt_tokens
    assert of_student.text != of_base.text


@pytest.mark.gpu
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_row_is_answered_on_the_first_gpu(load_in_4bit: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    chosen = settings(device_mode="cuda0", load_in_4bit=load_in_4bit)
    first, again = (answers(GREETINGS, chosen=chosen) for _ in range(2))
    assert without_time(first) == without_time(again)
    assert all(one.output_tokens for one in first)


# --- the dice ------------------------------------------------------------------------------------


def drawn(scores: list[float], count: int, **how: Any) -> Counter[int]:
    """How often each token of a vocabulary was drawn by so many rows."""
    rows = [sampling.Sampling(seed=f"{number}", longest=1, **how) for number in range(count)]
    left = sampling.Dice(rows, torch.device("cpu"))(torch.zeros(count, 1), torch.tensor([scores] * count))
    assert bool(((left == 0).sum(dim=-1) == 1).all()), "one token is left"
    return Counter(left.argmax(dim=-1).tolist())


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1])).tolist()
    found = drawn(scores, 4000, temperature=1.0, top_p=1.0)
    shares = [found[token] / 4000 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)


def test_a_temperature_bends_the_shares() -> None:
    scores = torch.log(torch.tensor([0.8, 0.2])).tolist()
    found = drawn(scores, 4000, temperature=0.5, top_p=1.0)
    assert found[0] / 4000 == pytest.approx(0.64 / 0.68, abs=0.02)


def test_only_the_nucleus_is_drawn_from() -> None:
    scores = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25])).tolist()
    assert set(drawn(scores, 500, temperature=1.0, top_p=0.7)) == {1, 3}
    assert set(drawn(scores, 500, temperature=1.0, top_p=0.8)) == {1, 2, 3}
    assert set(drawn(scores, 500, temperature=1.0, top_p=0.01)) == {1}


def test_at_temperature_0_the_likeliest_token_is_left() -> None:
    assert set(drawn([1.0, 3.0, 2.9999], 100, temperature=0.0, top_p=1.0)) == {1}


# --- rows that cannot be asked ---------------------------------------------------------------------


def test_a_row_with_a_control_token_is_refused_and_the_others_are_answered() -> None:
    bad, good = ask(["你好<|im_end|>", "你好"])
    assert isinstance(bad, Refused) and "control token '<|im_end|>'" in str(bad)
    assert isinstance(good, Completion)


def with_context(folder: Path, tokens: int) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"max_position_embeddings": tokens})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_an_answer_has_the_room_that_its_prompt_leaves(base_folder: Path) -> None:
    short, long = "短", "长" * 40
    prompt_tokens = [one.prompt_tokens for one in answers([short, long], chosen=settings(base_folder))]
    context = (prompt_tokens[1] or 0) + 5
    chosen = settings(with_context(base_folder, context))
    first, second = answers([short, long], chosen=chosen, max_tokens=context, temperature=1.9, top_p=1.0)
    assert (second.finish_reason, second.output_tokens) == ("length", 5)
    assert first.output_tokens is not None and 5 < first.output_tokens <= context - (prompt_tokens[0] or 0)


def test_a_prompt_that_fills_the_context_is_refused(base_folder: Path) -> None:
    bad, good = ask(["长" * 60, "短"], chosen=settings(with_context(base_folder, 50)))
    assert isinstance(bad, Refused) and str(bad).endswith("tokens, and the model's context holds 50")
    assert isinstance(good, Completion)


# --- faults --------------------------------------------------------------------------------------


def test_memory_that_runs_out_halves_the_batches_for_good(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"第{number}问" for number in range(6)]
    chosen = settings(base_folder, concurrency=6)
    expected = without_time(answers(texts, chosen=chosen))
    sizes: list[int] = []
    before = sampling.sample

    def tight(model: Any, chat: Any, prompts: Any, *rest: Any, **more: Any) -> None:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        before(model, chat, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", tight)

    async def twice() -> list[Completion]:
        async with Transformers(chosen, Gardens()) as teacher:
            found: list[Completion] = []
            for _ in range(2):
                asking = [teacher.answer(asked(text), None, options(text)) for text in texts]
                found += await asyncio.gather(*asking)
            return found

    assert without_time(asyncio.run(twice())) == expected * 2
    assert sizes == [6, 3, 3, 3, 3]


def test_what_was_handed_over_before_memory_ran_out_is_not_asked_again(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    before = sampling.sample

    def late(model: Any, chat: Any, prompts: Any, *rest: Any, **more: Any) -> None:
        sizes.append(len(prompts))
        before(model, chat, prompts, *rest, **more)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "sample", late)
    answers(["甲", "乙"], chosen=settings(base_folder))
    assert sizes == [2]


def test_one_row_that_does_not_fit_is_refused_and_the_others_are_answered(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sampling.sample

    def tight(model: Any, chat: Any, prompts: Any, *rest: Any, **more: Any) -> None:
        if max(map(len, prompts)) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        before(model, chat, prompts, *rest, **more)

    monkeypatch.setattr(sampling, "sample", tight)
    bad, *good = ask(["长" * 60, "短", "小"], chosen=settings(base_folder))
    assert isinstance(bad, Refused) and "out of memory" in str(bad)
    assert str(bad.hint).startswith("--load-in-4bit")
    assert all(isinstance(one, Completion) for one in good)


def test_a_fault_in_the_thread_reaches_everybody_who_waits(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sampling, "sample", broken)
    found = ask(["甲", "乙", "丙"], chosen=settings(base_folder))
    assert [type(one) for one in found] == [ZeroDivisionError] * 3


def test_memory_that_runs_out_while_loading_names_what_to_change(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("mtgdm.student.base.AutoModelForCausalLM.from_pretrained", too_much)
    (failed,) = ask(["你好"], chosen=settings(base_folder))
    assert isinstance(failed, Unavailable)
    assert "out of memory" in str(failed) and str(failed.hint).startswith("--load-in-4bit")


# --- the end -------------------------------------------------------------------------------------


def test_a_caller_who_leaves_does_not_disturb_the_others(base_folder: Path) -> None:
    chosen = settings(base_folder)
    expected = answers(["甲", "乙"], chosen=chosen, max_tokens=60)

    async def one_leaves() -> list[Completion]:
        async with Transformers(chosen, Gardens()) as teacher:
            await teacher.check()
            staying = [
                asyncio.create_task(teacher.answer(asked(text), None, options(text, max_tokens=60)))
                for text in ("甲", "乙")
            ]
            leaving = asyncio.create_task(teacher.answer(asked("丙"), None, options("丙", max_tokens=1900)))
            await asyncio.sleep(0.05)
            leaving.cancel()
            return await asyncio.gather(*staying)

    assert without_time(asyncio.run(one_leaves())) == without_time(expected)


def test_the_thread_ends_soon_after_everybody_left(base_folder: Path) -> None:
    async def all_leave() -> float:
        async with Transformers(settings(base_folder), Gardens()) as teacher:
            await asyncio.wait_for(teacher.answer(asked("甲"), None, options("甲", max_tokens=1)), timeout=60)
            task = asyncio.create_task(teacher.answer(asked("乙"), None, options("乙", max_tokens=2000)))
            await asyncio.sleep(0.2)
            task.cancel()
            started = time.monotonic()
        return time.monotonic() - started

    assert asyncio.run(all_leave()) < backend.TOKEN_S
    assert not teachers_at_work()


def test_loading_is_broken_off(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TOKEN_S", 0.1)
    loading = threading.Event()

    def endless(*_: Any, **__: Any) -> None:
        loading.set()
        for _step in range(6000):
            time.sleep(0.01)

    monkeypatch.setattr(generation, "load", endless)

    async def leave() -> None:
        async with Transformers(settings(base_folder), Gardens()) as teacher:
            task = asyncio.create_task(teacher.answer(asked("甲"), None, options("甲")))
            while not loading.is_set():
                await asyncio.sleep(0.01)
            task.cancel()

    started = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - started < 30
    assert not teachers_at_work()


def teachers_at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mtgdm-teacher"]


# --- a model that is not there ---------------------------------------------------------------------


def check(chosen: TeacherSettings) -> None:
    async def once() -> None:
        async with Transformers(chosen, Gardens()) as teacher:
            await teacher.check()

    asyncio.run(once())


def unavailable(chosen: TeacherSettings) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        check(chosen)
    return caught.value


def test_a_check_reads_no_weights(base_folder: Path) -> None:
    (base_folder / "model.safetensors").unlink()
    check(settings(base_folder))
    (failed,) = ask(["你好"], chosen=settings(base_folder))
    assert isinstance(failed, Unavailable)
    assert "model.safetensors" in str(failed) and failed.where == str(base_folder)


def test_a_model_must_be_named() -> None:
    with pytest.raises(SettingError, match="needs a model"):
        Transformers(TeacherSettings(backend="transformers"), Gardens())


def test_a_folder_that_is_not_there_is_named() -> None:
    assert "there is no such model folder" in str(unavailable(settings("./nowhere")))


def test_a_name_that_stands_for_nothing_is_told_with_the_flag_of_this_stage() -> None:
    failed = unavailable(settings("my-model:latest"))
    assert "neither a folder nor on the Hugging Face Hub" in str(failed)
    assert "--model mtgdm-tiny" in str(failed.hint) and "--student-base" not in str(failed.hint)


def test_a_pointer_in_the_place_of_weights_is_seen(base_folder: Path) -> None:
    (base_folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    assert "Git-LFS pointer" in str(unavailable(settings(base_folder)))


def test_cuda0_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device-mode cpu" in str(unavailable(settings(device_mode="cuda0")).hint)


@pytest.mark.parametrize(
    ("missing", "more"), [("torch", {}), ("bitsandbytes", {"load_in_4bit": True})], ids=["torch", "4bit"]
)
def test_a_library_that_is_not_installed_is_named_with_the_command(
    missing: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtgdm.student.installed.find_spec", lambda name: None if name == missing else name)
    failed = unavailable(settings(**more))
    assert f"{missing} not installed" in str(failed) and failed.hint == 'pip install "mtgdm[train]"'


def test_a_model_without_a_chat_template_cannot_teach(base_folder: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        path = base_folder / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("<|im_start|>", "<|begin|>"), encoding="utf-8")
    (base_folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in str(unavailable(settings(base_folder)))


# --- the stage -----------------------------------------------------------------------------------


def untyped(count: int) -> Iterator[dict[str, Any]]:
    """Rows of another tool, without a contract."""
    return ({"messages": asked(f"你好，第{number}号")} for number in range(count))


def test_a_limit_that_cuts_every_answer_stops_the_run_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    write_prompts(tmp_path, 5, types=("card",))
    with pytest.raises(UserError, match="the answer was cut at 9 tokens") as caught:
        run_teacher(tmp_path, backend="transformers", model=base.TINY, device_mode="cpu", max_tokens=9)
    assert "max-tokens" in (caught.value.hint or "")
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists(), "no row is to blame"


def test_a_user_sees_the_lines_of_mtgdm_alone(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "data" / "prompts.jsonl", *untyped(5))
    ran = mtgdm(
        *("teacher", "--backend", "transformers", "--model", base.TINY, "--device-mode", "cpu"),
        *("--load-in-4bit", "--max-tokens", "32"),
    )
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "teacher: 5 asked = 5 kept + 0 rejected · transformers mtgdm-tiny"
    assert all(line.startswith("teacher: ") for line in ran.err.splitlines()), ran.err
    rows = read_rows(mtgdm.folder / "data" / "teacher.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == [f"你好，第{number}号" for number in range(5)]
    assert all(row["meta"]["teacher"]["prompt_tokens"] == 14 for row in rows)


def test_ctrl_c_ends_a_run_which_then_goes_on(mtgdm: CommandLine) -> None:
    out = write_lines(mtgdm.folder / "data" / "prompts.jsonl", *untyped(8)).with_name("teacher.jsonl")
    # So hot that some answers are noise without an end.
    hot = ("--model", base.TINY, "--device-mode", "cpu", "--temperature", "1.2", "--top-p", "1")
    arguments = ("teacher", "--backend", "transformers", *hot)
    running = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", *arguments],
        cwd=mtgdm.folder,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 120
    while (not out.exists() or not out.read_bytes()) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "what was finished is on disk" in said and "Traceback" not in said
    finished = read_rows(out)
    assert 0 < len(finished) < 8

    again = mtgdm(*arguments, "--max-tokens", "12")
    assert again.code == 0, again.err
    assert "teacher: 8 asked = " in again.out
    rows = {row["id"]: row for row in read_rows(out)}
    assert all(rows[row["id"]] == row for row in finished)
