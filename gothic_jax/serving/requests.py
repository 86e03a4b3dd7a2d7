"""Requests for completions and chat completions, checked field by field.

The fields are those of https://platform.openai.com/docs/api-reference, with `voice`, `blend`,
`top_k`, `raw_prompt` and `copy_guard` besides.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gothic_jax.errors import UserError
from gothic_jax.machine.files import parse_json
from gothic_jax.model.shape import INTEGER_LIMIT
from gothic_jax.text.tokenizer import Tokenizer
from gothic_jax.text.voices import Blend, complete, one_voice, parse_weights
from gothic_jax.writing.settings import MAX_GUARDED, MIN_GUARDED, Sampling, Settings
from gothic_jax.writing.slots import MAX_LIKELIEST

MAX_TOKENS = 4096
MAX_SAMPLES = 16
MAX_TEXTS = 64
"""Of one request: prompts times samples."""
MAX_STOPS, MAX_STOP_LENGTH = 16, 200

OURS = {"voice", "blend", "top_k", "raw_prompt", "copy_guard"}
SHARED = OURS | {"model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream"}
SHARED |= {"stream_options", "logprobs"}
READ = {
    False: SHARED | {"prompt", "echo", "best_of"},
    True: SHARED | {"messages", "max_completion_tokens", "top_logprobs"},
}
"""The fields that are read, without and with chat."""
_OPENAIS = """
audio frequency_penalty function_call functions logit_bias metadata modalities
parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
reasoning_effort response_format safety_identifier service_tier store suffix tool_choice tools user
verbosity web_search_options
"""
_OF_CLIENTS = """
add_bos_token adaptive_decay adaptive_target api_server api_type ban_eos_token banned_strings
banned_tokens cache_prompt char_name chat_completion_source custom_token_bans do_sample
dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dry_range dry_sequence_breakers
dynamic_temperature dynatemp_exponent dynatemp_high dynatemp_low dynatemp_range early_stopping
encoder_repetition_penalty epsilon_cutoff eta_cutoff freq_pen grammar grammar_string group_names
guidance_scale ignore_eos include_reasoning include_stop_str_in_output json_schema length_penalty
logits_processors max_new_tokens min_keep min_length min_p min_tokens mirostat mirostat_eta
mirostat_mode mirostat_tau n_keep n_predict n_probs negative_prompt no_repeat_ngram_size nsigma
num_beams penalize_nl penalty_alpha penalty_range presence_pen reasoning rep_pen rep_pen_range
rep_pen_slope repeat_last_n repeat_penalty repetition_decay repetition_penalty
repetition_penalty_range return_token_ids sampler_order sampler_priority sampler_seed samplers skew
skip_special_tokens smoothing_curve smoothing_factor spaces_between_special_tokens
speculative_ngram stopping_strings temperature_last tfs tfs_z top_a top_n_sigma truncation_length
typical typical_p use_beam_search use_default_badwordsids user_name xtc_probability xtc_threshold
"""
IGNORED = frozenset((_OPENAIS + _OF_CLIENTS).split())
"""Fields without effect here: OpenAI's others, and those of clients that know several servers."""


class RequestError(Exception):
    """What is wrong with a request, as OpenAI's errors say it."""

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def as_dict(self) -> dict[str, Any]:
        """The response's body."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Model(NamedTuple):
    """What a request is checked against."""

    name: str
    tokenizer: Tokenizer
    copy_guard: int | None
    """Of requests that name none."""
    has_index: bool


@dataclass(frozen=True)
class Request:
    """A request for texts, checked."""

    model: str
    chat: bool
    prompts: list[str | list[int]]
    settings: Settings
    n: int
    best_of: int
    stop: list[str]
    stream: bool
    include_usage: bool
    echo: bool
    likeliest: int | None
    """How many of the likeliest tokens are reported at each place; None: no log-probabilities."""
    raw_prompt: bool
    copy_guard: int | None
    warnings: list[str]
    """What of the request has no effect here."""


def parse(body: bytes, model: Model, *, chat: bool) -> Request:
    """The request in a body; raises RequestError, which names the field, where it is not one."""
    fields = Fields(parse_object(body), READ[chat])
    warnings = [f"{name} has no effect here" for name in fields.ignored]
    if chat:
        prompt, named = _conversation(fields, model.tokenizer.voices, warnings)
        prompts: list[str | list[int]] = [prompt]
        top = fields.integer("top_logprobs", 0, 0, MAX_LIKELIEST)
        likeliest = top if fields.boolean("logprobs") else None
    else:
        prompts, named = _prompts(fields, model.tokenizer), {}
        likeliest = fields.integer("logprobs", -1, 0, MAX_LIKELIEST)
        likeliest = None if likeliest < 0 else likeliest
    name, blend = _model_and_blend(fields, model, named)
    n = fields.integer("n", 1, 1, MAX_SAMPLES)
    best_of = n if chat else fields.integer("best_of", n, n, MAX_SAMPLES)
    if len(prompts) * best_of > MAX_TEXTS:
        raise RequestError(f"prompts times samples must be at most {MAX_TEXTS}", param="n")
    stream, echo = fields.boolean("stream"), not chat and fields.boolean("echo")
    if best_of > n and not model.has_index:
        raise RequestError(
            "best_of needs an index of the training text, and this server has none",
            param="best_of",
        )
    if stream and best_of > n:
        raise RequestError("best_of above n cannot be streamed", param="best_of")
    return Request(
        model=name,
        chat=chat,
        prompts=prompts,
        settings=_settings(fields, blend, least=0 if echo else 1),
        n=n,
        best_of=best_of,
        stop=_stops(fields),
        stream=stream,
        include_usage=_include_usage(fields),
        echo=echo,
        likeliest=likeliest,
        raw_prompt=fields.boolean("raw_prompt"),
        copy_guard=_copy_guard(fields, model),
        warnings=warnings,
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; raises RequestError."""
    try:
        value = parse_json(body)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    return value


class Fields:
    """The fields of a request's object; null means that a field is not there.

    Each method gives a field or its default, and raises RequestError where it is out of range.
    """

    def __init__(self, values: Mapping[str, Any], known: Collection[str]) -> None:
        """Raises RequestError for a field that is neither known nor IGNORED, or no Unicode."""
        for name, value in values.items():
            _check_unicode(name, value)
        self._values = {name: value for name, value in values.items() if value is not None}
        self.ignored = [name for name in self._values if name in IGNORED]
        if unknown := [name for name in self._values if name not in known and name not in IGNORED]:
            name = unknown[0][:60]
            raise RequestError(f"there is no field {name!r}; leave it out", param=name)

    def get(self, name: str) -> Any:
        """The field as it is, or None."""
        return self._values.get(name)

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        value = self._values.get(name, default)
        if type(value) is float and value.is_integer():  # from clients that know no other numbers
            value = int(value)
        if type(value) is not int or (not least <= value <= most and name in self._values):
            raise RequestError(f"{name} must be a whole number from {least} to {most}", param=name)
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self._values.get(name, default)
        if type(value) not in (int, float) or abs(value) > 1e9 or not math.isfinite(value):
            raise RequestError(f"{name} must be a number", param=name)
        return float(value)

    def boolean(self, name: str) -> bool:
        """True or false, which is the default."""
        value = self._values.get(name, False)
        if type(value) is not bool:
            raise RequestError(f"{name} must be true or false", param=name)
        return value

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise RequestError(f"{name} must be a string", param=name)
        return value

    def blend(self, name: str, voices: Collection[str]) -> Blend:
        """Weights by voice: an object, or a string as `--blend` takes it."""
        return checked_blend(self._values.get(name), name, voices)


def _check_unicode(name: str, value: Any) -> None:
    """Raises RequestError where there are lone surrogates, which no answer could repeat."""
    try:
        json.dumps([name, value], ensure_ascii=False).encode()
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except UnicodeEncodeError as error:
        shown = name.encode(errors="replace").decode()[:60]
        raise RequestError(
            f"{shown} is not valid Unicode; leave out lone surrogates", param=shown
        ) from error


def checked_blend(value: Any, name: str, voices: Collection[str]) -> Blend:
    """Weights by voice from JSON; raises RequestError where they are not those of `voices`."""
    if isinstance(value, dict):
        if not all(type(weight) in (int, float) for weight in value.values()):
            raise RequestError(f"{name} must have a number for each voice", param=name)
        value = ",".join(f"{voice}={weight!r}" for voice, weight in value.items())
    elif not isinstance(value, str):
        raise RequestError(f"{name} must have weights by voice", param=name)
    try:
        blend = parse_weights(value, name=name, known=voices) if value else {}
        complete(blend, voices)
    except (UserError, OverflowError) as error:
        raise RequestError(str(error), param=name) from error
    return blend


def _settings(fields: Fields, blend: Blend, *, least: int) -> Settings:
    default = Sampling()
    top_k = fields.integer("top_k", default.top_k, -1, 2**31 - 1)
    name = "max_completion_tokens" if fields.get("max_completion_tokens") else "max_tokens"
    seed = fields.integer("seed", -1, -1, INTEGER_LIMIT - 1)
    settings = Settings(
        Sampling(
            fields.number("temperature", default.temperature),
            max(top_k, 0),  # some clients have -1 for all tokens
            fields.number("top_p", default.top_p),
        ),
        fields.integer(name, 16, least, MAX_TOKENS),
        blend,
        None if seed < 0 else seed,
    )
    try:
        settings.sampling.validate()
    except UserError as error:
        param = str(error).split()[0].replace("-", "_")
        raise RequestError(str(error), param=param) from error
    return settings


def _prompts(fields: Fields, tokenizer: Tokenizer) -> list[str | list[int]]:
    value = fields.get("prompt")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(type(one) is int for one in value):
            value = [value]
        if all(_is_tokens(one, tokenizer) for one in value):
            return value
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids that stand for text, or a"
        " list of such lists",
        param="prompt",
    )


def _is_tokens(value: Any, tokenizer: Tokenizer) -> bool:
    lengths = tokenizer.byte_lengths
    return isinstance(value, list) and all(
        type(token) is int and 0 <= token < len(lengths) and lengths[token] > 0 for token in value
    )


def _conversation(
    fields: Fields, voices: Collection[str], warnings: list[str]
) -> tuple[str, Blend]:
    """The text that the messages are together, and the blend that a system message names.

    As in the template of exported models: what system messages say besides is not read.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of messages", param="messages")
    text = ""
    blend: Blend = {}
    for message in messages:
        if not isinstance(message, dict):
            raise RequestError("each message must be an object", param="messages")
        content = _content(message.get("content"))
        match message.get("role"):
            case "user" | "assistant":
                text += content
            case "system" | "developer":
                if (named := _named(content, voices)) is None:
                    warnings.append("a system message that names no voice is not read")
                else:
                    blend = named
            case _:
                raise RequestError(
                    "a message's role must be system, developer, user or assistant",
                    param="messages",
                )
    return text, blend


def _content(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise RequestError("a message's content must be text", param="messages")


def _named(content: str, voices: Collection[str]) -> Blend | None:
    content = content.strip()
    if content in voices or content == "none":
        return one_voice(content)
    try:
        return checked_blend(content, "messages", voices) if "=" in content else None
    except RequestError:
        return None


def _model_and_blend(fields: Fields, model: Model, named: Blend) -> tuple[str, Blend]:
    voices = model.tokenizer.voices
    given = fields.text("model", model.name)
    name, _, voice = (given, "", "") if given == model.name else given.rpartition(":")
    if name != model.name or (voice and voice not in voices):
        raise RequestError(
            f"there is no model {given[:80]!r} here; /v1/models lists those that there are",
            param="model",
            status=404,
            code="model_not_found",
        )
    if fields.get("voice") is not None and fields.get("blend") is not None:
        raise RequestError("voice and blend exclude each other; leave one out", param="voice")
    if fields.get("blend") is not None:
        return given, fields.blend("blend", voices)
    if fields.get("voice") is not None:
        blend = one_voice(fields.text("voice"))
        try:
            complete(blend, voices)
        except UserError as error:
            raise RequestError(str(error), param="voice") from error
        return given, blend
    return given, named or (one_voice(voice) if voice else {})


def _stops(fields: Fields) -> list[str]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)
    ):
        raise RequestError(
            f"stop must be a string or at most {MAX_STOPS} of them, each of 1 to"
            f" {MAX_STOP_LENGTH} characters",
            param="stop",
        )
    return stops


def _include_usage(fields: Fields) -> bool:
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object", param="stream_options")
    return options.get("include_usage") is True


def _copy_guard(fields: Fields, model: Model) -> int | None:
    if fields.get("copy_guard") is None:
        return model.copy_guard
    if not model.has_index:
        raise RequestError(
            "copy_guard needs an index of the training text, and this server has none",
            param="copy_guard",
        )
    return fields.integer("copy_guard", MIN_GUARDED, MIN_GUARDED, MAX_GUARDED)
