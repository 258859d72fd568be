"""The words with which servers say how an answer ended, and what each means.

OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI, LM Studio, Anthropic, Gemini, Mistral, Cohere, DeepSeek, Qwen, Zhipu
and the proxies before them each have their own.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Finish(StrEnum):
    """How an answer ended."""

    STOP = "stop"
    """By itself."""
    LENGTH = "length"
    """At the limit of tokens, or of the context."""
    FILTERED = "filtered"
    """By a filter of its content, which would end it there again."""
    FAILED = "failed"
    """By a failure of the server, which can pass."""
    STOPPED = "stopped"
    """By us, while it was written."""
    REPETITION = "repetition"
    """By a guard of the server against endless repetition."""
    NO_ANSWER = "no answer"
    """As something that is no answer: a call of a tool, a model that was only loaded."""
    UNKNOWN = "unknown"
    """In a word that nobody here knows."""


_WORDS = {
    Finish.STOP: (
        "stop stopped_by_stop stop_sequence stop_sequence_matched stop_token stop_str stop_criteria eos eos_token "
        "eos_token_id eod end end_turn end_of_turn end_of_sequence end_of_text endoftext complete completed done "
        "finish finished finish_reason_stop success succeeded natural normal"
    ),
    Finish.LENGTH: (
        "length max_tokens max_token max_new_tokens max_output_tokens max_completion_tokens model_length "
        "model_context_window_exceeded context_length context_length_exceeded context_window_exceeded token_limit "
        "limit incomplete truncated finish_reason_max_tokens max_length maximum_length error_limit"
    ),
    Finish.FILTERED: (
        "content_filter content_filtered contentfilter filter filtered sensitive safety recitation blocklist "
        "prohibited_content spii image_safety language refusal refused moderation moderated guardrail "
        "guardrail_intervened data_inspection_failed error_toxic"
    ),
    Finish.FAILED: (
        "abort aborted error failed failure cancel cancelled canceled insufficient_system_resource interrupted "
        "timeout timed_out network_error server_error internal_error unavailable overloaded other "
        "finish_reason_unspecified malformed_response"
    ),
    Finish.STOPPED: "stopped",
    Finish.REPETITION: "repetition repeat repetition_detected repetition_stop loop",
    Finish.NO_ANSWER: (
        "tool_call tool_calls tool_use function_call malformed_function_call unexpected_tool_call load unload "
        "pause_turn no_answer"
    ),
}
_KNOWN = {word: kind for kind, words in _WORDS.items() for word in words.split()}


def finish(word: str) -> Finish:
    """What a finish reason means, whatever its case and however its parts are joined."""
    plain = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()).strip("_")
    return _KNOWN.get(plain, Finish.UNKNOWN)
