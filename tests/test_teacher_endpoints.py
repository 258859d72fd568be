"""Where questions go: several addresses, those that are down, and a server that has too much to do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mtgdm import plugins
from mtgdm.domain import Message
from mtgdm.errors import SettingError, UserError
from mtgdm.rows import read_rows as read_rows_of
from mtgdm.teachers import endpoints, loop
from mtgdm.teachers.endpoints import Endpoint, Limit
from mtgdm.teachers.judgement import Judge
from mtgdm.teachers.seam import (
    Backend,
    Completion,
    Options,
    Refused,
    Retryable,
    TeacherSettings,
    Unavailable,
)
from mtgdm.testing import StageRun
from tests.conftest import read_rows, write_lines
from tests.ollama_server import Fault, OllamaServer, Question
from tests.teacher_domain import Gardens, find, prompt_rows, right_answer, run_teacher, write_prompts


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find", find)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer, latency_s=0.02) as running:
        yield running


@pytest.fixture
def other() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer, latency_s=0.02) as running:
        yield running


def ask(workspace: Path, *urls: str, **settings: Any) -> StageRun:
    return run_teacher(workspace, backend="ollama", model="teacher:7b", url=list(urls), **settings)


def kept(workspace: Path) -> int:
    return len(read_rows(workspace / "data" / "teacher.jsonl"))


# --- the limit ---------------------------------------------------------------------------------


def answers(limit: Limit, count: int, *, busy: int = 0) -> None:
    """So many answers to questions that are asked under the limit as it is."""
    decreases = limit.decreases
    for number in range(count):
        limit.note(decreases, busy=number < busy)


def test_the_limit_begins_at_what_was_set_and_never_passes_it() -> None:
    limit = Limit(8)
    answers(limit, 1000)
    assert limit.now == 8


def test_a_busy_server_halves_the_limit_once_for_all_that_was_asked_before() -> None:
    limit = Limit(32)
    answers(limit, 32, busy=32)
    assert limit.now == 16


def test_the_limit_grows_by_one_with_as_many_answers_as_may_be_in_flight() -> None:
    limit = Limit(32)
    answers(limit, 32, busy=32)
    answers(limit, 15)
    assert limit.now == 16
    answers(limit, 1)
    assert limit.now == 17
    answers(limit, 17)
    assert limit.now == 18


@pytest.mark.parametrize(("most", "tolerated"), [(4, 2), (32, 3), (100, 10)])
def test_stray_busy_answers_among_many_change_nothing(most: int, tolerated: int) -> None:
    limit = Limit(most)
    for _ in range(20):
        answers(limit, max(most, 20), busy=tolerated)
    assert limit.now == most
    answers(limit, max(most, 20), busy=tolerated + 1)
    assert limit.now == most // 2


def test_the_limit_never_falls_below_one() -> None:
    limit = Limit(4)
    for _ in range(5):
        answers(limit, 20, busy=20)
    assert limit.now == 1
    answers(limit, 1)
    assert limit.now == 2


# --- a server that has too much to do ----------------------------------------------------------


def test_a_server_that_takes_few_is_asked_few_at_once(tmp_path: Path, server: OllamaServer) -> None:
    """As Ollama with a short queue: above 6 at once, 503."""
    write_prompts(tmp_path, 150)
    refused: list[int] = []
    at_once: list[int] = []

    def fault(question: Question) -> Fault | None:
        at_once.append(server.in_flight)
        if server.in_flight <= 6:
            return None
        refused.append(question.number)
        return Fault(503, {"error": "server busy, please try again.  maximum pending requests exceeded"})

    server.fault = fault
    run = ask(tmp_path, server.url, concurrency=32)
    assert run.result.counts["kept"] == 300
    assert max(at_once[: len(at_once) // 4]) > 12, "it begins with what was set"
    assert max(at_once[len(at_once) // 2 :]) <= 9, "and learns"
    late = [number for number in refused if number > len(at_once) // 2]
    assert len(late) < len(at_once) // 2 // 4, (len(late), len(refused), len(at_once))


class Slow(Backend):
    """Its first twelve answers never come."""

    asked = in_flight = most_after = 0

    async def check(self) -> None:
        """Always there."""

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        self.asked += 1
        self.in_flight += 1
        number = self.asked
        if number > 24:
            self.most_after = max(self.most_after, self.in_flight)
        try:
            await asyncio.sleep(60 if number <= 12 else 0.01)
        finally:
            self.in_flight -= 1
        facts = options.row.meta["record"]
        return Completion(Gardens().answer(facts, str(options.row.type)), "stop", 9, 9, 0.01)


def test_a_timeout_counts_as_too_much_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.02)
    prompts = write_lines(tmp_path / "prompts.jsonl", *prompt_rows(20))
    settings = TeacherSettings(backend="slow", concurrency=12, timeout_s=0.2, first_token_timeout_s=0.2)
    backend = Slow(settings, Gardens())
    outcomes: list[loop.Outcome] = []
    asking = loop.Loop([backend], settings, Judge(Gardens()))
    asyncio.run(asking.run(read_rows_of(prompts), outcomes.append))
    assert [outcome.reason for outcome in outcomes] == [None] * 40
    assert backend.asked == 52
    assert 4 <= backend.most_after <= 10, "half of twelve, and growing again"


def test_rows_that_wait_for_their_next_try_hold_up_no_other(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 40)
    waiting = {"第5园", "第6园"}
    server.fault = lambda question: (
        Fault(429, headers={"Retry-After": "2"})
        if question.times == 0 and any(name in question.text for name in waiting)
        else None
    )
    ask(tmp_path, server.url, concurrency=4)
    first = [place for place, question in enumerate(server.questions) if question.times == 1]
    assert kept(tmp_path) == 80
    assert min(first) > 50, "the others were asked while four waited two seconds"


# --- several addresses -------------------------------------------------------------------------


def test_several_addresses_share_the_work(tmp_path: Path, server: OllamaServer, other: OllamaServer) -> None:
    write_prompts(tmp_path, 50)
    run = ask(tmp_path, server.url, other.url, concurrency=8)
    assert run.result.counts["kept"] == 100
    assert len(server.asked) + len(other.asked) == 100
    assert 30 <= len(server.asked) <= 70
    assert server.most_in_flight + other.most_in_flight <= 10


def test_the_faster_of_two_does_more(tmp_path: Path, server: OllamaServer, other: OllamaServer) -> None:
    other.latency_s = 0.2
    write_prompts(tmp_path, 50)
    ask(tmp_path, server.url, other.url, concurrency=4)
    assert len(server.asked) > 3 * len(other.asked) > 0


def test_an_address_that_is_down_from_the_start_is_left_aside_and_said(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 20)
    run = ask(tmp_path, "127.0.0.1:9", server.url, concurrency=4)
    assert run.result.counts["kept"] == 40
    assert "127.0.0.1:9 is left aside for a while: no Ollama server answers" in " ".join(run.warnings)
    assert " ".join(run.warnings).count("left aside") == 1


def test_one_that_lacks_the_model_is_left_aside(
    tmp_path: Path, server: OllamaServer, other: OllamaServer
) -> None:
    other.models = {"else:1b": 4096}
    write_prompts(tmp_path, 20)
    run = ask(tmp_path, server.url, other.url)
    assert run.result.counts["kept"] == 40
    assert "the model 'teacher:7b' is not pulled" in " ".join(run.warnings)


def test_one_that_lacks_the_model_ends_no_run_while_the_other_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(endpoints, "FIRST_PAUSE_S", 0.05)
    lacking = Gone(lambda place, times: Unavailable("no such model"))
    away = Gone(lambda place, times: not_reached() if len(away.asked) == 3 else None)
    assert away.ask_all(tmp_path, lacking, retries=6) == {}
    assert lacking.asked


def test_one_that_stays_away_is_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "LONGEST_PAUSE_S", 0.002)
    warnings: list[str] = []
    away, there = Gone(lambda place, times: not_reached()), Gone(lambda place, times: time.sleep(0.003))
    assert away.ask_all(tmp_path, there, warn=warnings.append) == {}
    assert len(away.asked) > 5
    assert len(warnings) == 1


def test_one_that_stays_away_for_days_is_tried_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    endpoint = Endpoint(Gone(lambda place, times: None), 4)
    for _ in range(5000):
        assert endpoint.lost()
        now[0] += endpoints.LONGEST_PAUSE_S
        assert not endpoint.aside


def test_none_that_can_be_asked_stops_the_run(tmp_path: Path, server: OllamaServer) -> None:
    server.models = {}
    write_prompts(tmp_path, 20)
    with pytest.raises(UserError, match="not pulled"):
        ask(tmp_path, "127.0.0.1:9", server.url)
    assert not (tmp_path / "data" / "teacher.jsonl").exists()


def test_one_that_dies_loses_no_row_and_is_asked_again_when_it_is_back(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 200)
    second = OllamaServer(right_answer, latency_s=0.02)
    with second:
        port = int(second.url.rpartition(":")[2])
        server.fault = lambda question: Fault(hang_s=0.05)

        def break_off() -> None:
            while len(second.questions) < 20:
                time.sleep(0.005)
            second.__exit__(None, None, None)
            time.sleep(0.6)
            second.port = port
            second.__enter__()

        breaking = threading.Thread(target=break_off)
        breaking.start()
        run = ask(tmp_path, server.url, second.url, concurrency=4)
        breaking.join()
        assert run.result.counts["kept"] == 400
        assert run.result.counts["rejected"] == 0
        assert len(second.questions) > 60, "it was asked again"


def test_a_backend_without_an_address_takes_one_at_most(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)
    with pytest.raises(SettingError, match="has no address, 2 were given"):
        run_teacher(tmp_path, url=["a", "b"])


# --- the first rows ----------------------------------------------------------------------------


def test_a_server_that_only_fails_is_told_within_seconds(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = lambda question: Fault(500)
    write_prompts(tmp_path, 20)
    started = time.monotonic()
    with pytest.raises(UserError, match="failed in the same way and none was answered: HTTP 500: boom"):
        ask(tmp_path, server.url, concurrency=8)
    assert time.monotonic() - started < 12
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_a_server_that_hangs_from_the_start_is_not_waited_for_again_and_again(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.fault = lambda question: Fault(hang_s=0.6)
    write_prompts(tmp_path, 20)
    with pytest.raises(UserError, match=r"5 rows failed .* and none was answered: no answer within 0.3 s"):
        ask(tmp_path, server.url, timeout_s=0.3, first_token_timeout_s=0.3)
    assert {question.times for question in server.questions} == {0, 1}


def test_a_run_of_few_rows_rejects_none_for_a_server_that_only_fails(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.fault = lambda question: Fault(500)
    write_prompts(tmp_path, 1)
    with pytest.raises(UserError, match="none was answered"):
        ask(tmp_path, server.url, retries=1)
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_first_rows_that_failed_while_the_server_was_cold_are_asked_again(
    tmp_path: Path, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.02)
    write_prompts(tmp_path, 10)
    times = 2 * (1 + loop.FIRST_RETRIES)

    def fault(question: Question) -> Fault | None:
        if "第0园" in question.text:
            return Fault(500) if question.times < times else None
        return Fault(hang_s=1.0) if question.times == 0 else None

    server.fault = fault
    run = ask(tmp_path, server.url, concurrency=24)
    assert run.result.counts == run.result.counts | {"kept": 20, "rejected": 0}


def test_a_teacher_whose_first_answers_are_all_rejected_is_warned_of(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.answer = lambda question: "不知道" if len(server.questions) < 60 else right_answer(question)
    write_prompts(tmp_path, 60)
    run = ask(tmp_path, server.url)
    assert "the first 20 answers were all rejected, the last for: " in " ".join(run.warnings)


class Gone(Backend):
    """A teacher that fails as its script says, by the place of a row and how often it was asked."""

    def __init__(self, script: Callable[[int, int], Exception | None]) -> None:
        super().__init__(TeacherSettings(), Gardens())
        self.script = script
        self.asked: list[int] = []

    async def check(self) -> None:
        """Always there."""

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        place = options.row.line
        failure = self.script(place, self.asked.count(place))
        self.asked.append(place)
        if failure is not None:
            raise failure
        facts = options.row.meta["record"]
        return Completion(Gardens().answer(facts, str(options.row.type)), "stop", 9, 9, 0.0)

    def ask_all(
        self, folder: Path, *others: Gone, retries: int = 0, warn: Callable[[str], None] = print
    ) -> dict[int, str]:
        """Ten rows one after the other; the reasons of those rejected by their place."""
        prompts = write_lines(folder / "prompts.jsonl", *prompt_rows(5))
        outcomes: list[loop.Outcome] = []
        settings = TeacherSettings(concurrency=1, retries=retries)
        asking = loop.Loop([self, *others], settings, Judge(Gardens()), warn=warn)
        asyncio.run(asking.run(read_rows_of(prompts), outcomes.append))
        assert sorted(one.row.line for one in outcomes) == list(range(1, 11))
        return {one.row.line: one.reason for one in outcomes if one.reason is not None}


def not_reached() -> Retryable:
    return Retryable("no connection", lost=True)


@pytest.mark.parametrize("refused", [False, True])
def test_rows_that_the_teacher_was_not_there_for_are_asked_again_when_it_is_back(
    refused: bool, tmp_path: Path
) -> None:
    away = {1, 2, 3} if refused else {5, 6, 7}

    def script(place: int, times: int) -> Exception | None:
        if place in away and times == 0:
            return not_reached()
        return Refused("too long") if refused and place == 4 else None

    assert Gone(script).ask_all(tmp_path) == ({4: "too long"} if refused else {})


def test_a_row_that_takes_the_teacher_down_each_time_is_asked_twice(tmp_path: Path) -> None:
    teacher = Gone(lambda place, times: not_reached() if place == 3 else None)
    assert teacher.ask_all(tmp_path) == {3: "no connection"}
    assert teacher.asked.count(3) == 2


@pytest.mark.parametrize("away", [9, 10])
def test_last_rows_that_the_teacher_was_not_there_for_are_left_to_the_next_run(
    away: int, tmp_path: Path
) -> None:
    def script(place: int, times: int) -> Exception | None:
        return None if place < 9 else not_reached() if place == away else Retryable("HTTP 500")

    with pytest.raises(Unavailable, match="since the last answer"):
        Gone(script).ask_all(tmp_path)
