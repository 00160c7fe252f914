"""onnxruntime-genai behind the `LanguageModel` Protocol: the model is genai's, the choice of each token is ours.

Invariants: keys and values of a request's tokens stay in its generator, and the next request with the same prefix
rewinds to what both share, so a preamble is read once; grammars need no generator of their own. Tokens that the
grammar forces are not asked of the model: they are appended together with the last chosen one in a single run. So are
guesses (guess.py) where the graph has the logits to confirm them by: a wrong one costs a row and is never written.
Memory is bounded: `generators` caches of `context` tokens, least recently used first out, and `adapters` adapters. An
adapter has run a token before it can be asked for; one that is replaced or unloaded takes its caches with it. A request
is cancelled between tokens, and between pieces of a long prompt (genai holds the GIL while it runs).
"""

from __future__ import annotations

import codecs
import json
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime_genai as og
from llguidance import LLMatcher, LLTokenizer

from edge_agent.engines.adapters import read_adapter, write_parameters
from edge_agent.engines.base import EngineInfo, Generate, Piece, Token, check_request
from edge_agent.engines.guess import Guesser
from edge_agent.errors import Refused, Retry
from edge_agent.machine import cpu_count
from edge_agent.wire.bundle import content_digest, scan

_CHUNK = 128  # tokens of a prompt read at once
_AHEAD = 4  # most guessed tokens in a run, of which the graph's `tail` has the logits
_GRAMMARS = 32
_MAX_GRAMMAR = 256 * 1024


@dataclass
class _Cache:
    """A generator and the tokens whose keys and values it holds."""

    generator: Any
    tokens: list[int] = field(default_factory=list)


class GenaiModel:
    """A language model from a genai folder. One thread at a time."""

    info: EngineInfo

    def __init__(
        self, path: Path, *, threads: int = 0, context: int = 2048, generators: int = 2, adapters: int = 8
    ) -> None:
        """Load `path`. Raises Refused when it is not a folder that onnxruntime-genai and its tokenizer can load."""
        started = time.perf_counter()
        threads = threads or cpu_count()
        try:
            settings = json.loads((path / "genai_config.json").read_text())["model"]
            config = og.Config(str(path))
            options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = og.Model(config)
            ends = settings["eos_token_id"]
            self._ends: list[int] = ends if isinstance(ends, list) else [ends]
            self._vocabulary = int(settings["vocab_size"])
            self._tokenizer = LLTokenizer(str(path / "tokenizer.json"), n_vocab=self._vocabulary, eos_token=self._ends)
            self._context = min(context, int(settings["context_length"]))
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise Refused(
                f"{path.name} cannot be loaded as a language model: {error}",
                "it is a folder made by `outrider models build`, or by onnxruntime-genai's model builder",
            ) from error
        self._generators, self._most_adapters = generators, adapters
        self._parameters = og.Adapters(self._model)
        self._adapters: dict[str, str] = {}  # by name, what genai calls each: no name is used twice there
        self._bias: dict[str, dict[int, float]] = {}  # by name, of tokens that a text may begin with
        self._loads = 0
        self._caches: OrderedDict[tuple[str, str], _Cache] = OrderedDict()
        self._grammars: OrderedDict[str, LLMatcher] = OrderedDict()
        self._bits = np.zeros((self._vocabulary + 31) // 32, dtype=np.uint32)
        self._guesser = Guesser(self._tokenizer, self._allowed)
        self._ahead: int | None = None  # how many may be guessed: the first run tells
        self.info = EngineInfo(
            engine=f"onnxruntime-genai {og.__version__}",
            provider="cpu",
            model=path.name,
            digest=content_digest(scan(path)),
            load_s=time.perf_counter() - started,
            extra={"threads": threads, "context": self._context, "generators": generators},
        )

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Stream the completion. Raises Refused for a bad grammar, an unknown adapter or lengths that do not fit."""
        prompt = self._encode(request)
        matcher = self._matcher(request.grammar) if request.grammar else None
        return self._stream(_Run(request, prompt, cancelled), matcher)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Add or replace an adapter. Raises Refused with nothing changed, Retry when there is no room to expand it."""
        if not name or (name not in self._adapters and len(self._adapters) >= self._most_adapters):
            raise Refused(f"{name!r} cannot be loaded beside {len(self._adapters)} adapters", "unload one")
        parameters, bias = read_adapter(folder, self.info.digest)
        self._loads += 1
        known = f"{name}/{self._loads}"
        try:
            with tempfile.TemporaryDirectory(prefix="outrider-adapter-") as scratch:
                path = Path(scratch) / "parameters"
                write_parameters(parameters, path)
                self._parameters.load(str(path), known)  # maps the file, which needs no name from then on
        except (OSError, RuntimeError) as error:
            hint = f"is there space in {tempfile.gettempdir()}?"
            raise Retry(f"the adapter {name} cannot be expanded: {error}", hint) from error
        if fault := self._fault(known):
            self._parameters.unload(known)
            raise Refused(f"the adapter {name} does not fit {self.info.model}: {fault}", "another base model?")
        if name in self._adapters:
            self.unload_adapter(name)
        self._adapters[name] = known
        first = [(self._tokenizer.tokenize_str(word)[0], by) for word, by in bias.items()]
        self._bias[name] = {token: sum(by for other, by in first if other == token) for token, _ in first}

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter and its caches. Raises Refused when it is not loaded, Retry when a text is half written."""
        if name not in self._adapters:
            raise Refused(f"{self.info.model} has no adapter {name!r}", "it was not loaded")
        for key in [key for key in self._caches if key[1] == name]:
            del self._caches[key]
        try:
            self._parameters.unload(self._adapters[name])
        except RuntimeError as error:
            raise Retry(f"the adapter {name} is in use", "when its text is written") from error
        del self._adapters[name], self._bias[name]

    def count(self, text: str) -> int:
        """Tokens of a text, special ones read as such."""
        return len(self._tokenizer.tokenize_str(text, parse_special=True))

    def close(self) -> None:
        """Free the caches and the model."""
        self._caches.clear()
        self._grammars.clear()
        self._parameters = self._model = None

    def _encode(self, request: Generate) -> list[int]:
        if request.adapter and request.adapter not in self._adapters:
            there = ", ".join(self._adapters) or "none"
            raise Refused(f"{self.info.model} has no adapter {request.adapter!r}", f"leave it empty; loaded: {there}")
        check_request(request)
        prompt: list[int] = self._tokenizer.tokenize_str(request.prefix + request.prompt, parse_special=True)
        if not 0 < len(prompt) < self._context:
            raise Refused(f"the prompt has {len(prompt)} tokens", f"it takes 1 to {self._context - 1}")
        return prompt

    def _matcher(self, grammar: str) -> LLMatcher:
        matcher = self._grammars.pop(grammar, None)
        if matcher is None:
            if len(grammar) > _MAX_GRAMMAR:
                raise Refused(f"the grammar has {len(grammar)} characters", f"at most {_MAX_GRAMMAR}")
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
            if matcher.is_error():
                raise Refused(f"the grammar is not usable: {matcher.get_error()[:500]}", "llguidance's Lark syntax")
        self._grammars[grammar] = matcher
        if len(self._grammars) > _GRAMMARS:
            self._grammars.popitem(last=False)
        return matcher.deep_copy()

    def _stream(self, run: _Run, matcher: LLMatcher | None) -> Iterator[Piece]:
        key = (run.request.prefix, run.request.adapter)
        cache = self._caches.pop(key, None) or self._new_cache(run.request.adapter)
        run.cached = _shared(cache.tokens, run.prompt)
        if run.cached < len(cache.tokens):
            self._rewind(cache, run.cached)
        random = np.random.default_rng(run.request.seed)
        waiting, ahead = run.prompt[run.cached :], list[int]()  # not yet read; read, and not yet decided
        logits = np.zeros((0, 0), np.float32)
        forced = matcher.compute_ff_tokens() if matcher else []
        limit = min(run.request.max_tokens, self._context - len(run.prompt))
        while not run.finish:
            top: list[tuple[int, float]] = []
            logprob = 0.0
            if forced:
                tokens = forced[: limit - run.written]
            else:
                if waiting:
                    ahead = self._guess(cache, waiting, run, matcher)
                    if not self._read(cache, waiting + ahead, run.cancelled):
                        run.finish = "cancelled"
                        break
                    waiting, logits = [], self._tail(cache)
                row = logits[-1 - len(ahead)]
                if matcher and not run.tokens and (bias := self._bias.get(run.request.adapter)):
                    row = row.copy()
                    row[list(bias)] += list(bias.values())
                token, logprob, top = self._choose(row, matcher, run.request, random)
                if token in self._ends:
                    run.finish = "stop"
                    break
                run.logprobs.append(logprob)
                tokens = [token]
            text = self._tokenizer.decode_bytes(tokens)
            for token in tokens:
                if ahead[:1] == [token]:
                    del ahead[0]
                    continue
                if ahead:
                    self._rewind(cache, len(cache.tokens) - len(ahead))
                    ahead = []
                waiting.append(token)
            if run.request.logprobs:
                likely = [(self._tokenizer.decode_bytes([other]), value) for other, value in top]
                run.told += [Token(self._tokenizer.decode_bytes([token]), logprob, likely) for token in tokens]
            run.write(text, tokens)
            if matcher:
                if not matcher.consume_tokens(tokens):
                    raise Refused(f"the grammar stopped: {matcher.get_error()[:500]}", "a simpler grammar")
                forced = matcher.compute_ff_tokens()
                if not run.finish and matcher.is_stopped():
                    run.finish = "stop"
            if not run.finish and run.written >= limit:
                run.finish = "length"
            if piece := run.piece():
                yield piece
        # a stream that breaks off above (an error, a caller that leaves) drops its cache with its state unknown
        self._caches[key] = cache
        yield run.last()

    def _read(self, cache: _Cache, tokens: list[int], cancelled: Callable[[], bool]) -> bool:
        for start in range(0, len(tokens), _CHUNK):
            if cancelled():
                return False
            chunk = tokens[start : start + _CHUNK]
            cache.generator.append_tokens(np.array(chunk, dtype=np.int32))
            cache.tokens += chunk
        return not cancelled()

    def _rewind(self, cache: _Cache, length: int) -> None:
        cache.generator.rewind_to(length)
        del cache.tokens[length:]

    def _tail(self, cache: _Cache) -> NDArray[np.float32]:
        """Logits of the last positions, one in each row; of the last alone when the graph gives no more."""
        if self._ahead != 0:
            try:
                tail = np.asarray(cache.generator.get_output("tail"))
                self._ahead = _AHEAD
                return tail
            except RuntimeError:
                self._ahead = 0
        return np.asarray(cache.generator.get_logits()).reshape(1, -1)

    def _guess(self, cache: _Cache, waiting: list[int], run: _Run, matcher: LLMatcher | None) -> list[int]:
        """Tokens to read ahead of those that wait, not before something was written."""
        most = min(self._ahead or 0, self._context - len(cache.tokens) - len(waiting))
        if matcher is None or not run.tokens or most < 1 or len(waiting) + most > _CHUNK:
            return []
        return self._guesser.guess(matcher.deep_copy(), run.tokens, run.prompt, most)

    def _allowed(self, matcher: LLMatcher) -> NDArray[np.uint8]:
        matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return np.unpackbits(self._bits.view(np.uint8), bitorder="little")

    def _choose(
        self, logits: NDArray[np.float32], matcher: LLMatcher | None, request: Generate, random: np.random.Generator
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """A token, the logarithm of its probability among those that the grammar allows, and the likeliest of these."""
        temperature = request.temperature
        allowed: NDArray[np.intp] | None = None
        if matcher:
            allowed = np.flatnonzero(self._allowed(matcher))
            logits = logits[allowed]
            if not len(allowed):
                raise Refused(f"the grammar allows no token here: {matcher.get_error()[:500]}", "check the grammar")
        best = int(logits.argmax())
        weights = np.exp(logits - logits[best])
        index = best
        if temperature > 0:
            heap = np.cumsum(np.exp((logits - logits[best]) / temperature))
            index = min(int(np.searchsorted(heap, random.random() * heap[-1], side="right")), len(heap) - 1)
        whole = weights.sum()

        def told(at: int) -> tuple[int, float]:
            logprob = float(np.log(weights[at] / whole)) if weights[at] > 0 else -100.0
            return (at if allowed is None else int(allowed[at])), logprob

        most = min(request.top_logprobs, len(logits)) if request.logprobs else 0
        first: list[int] = np.argpartition(-logits, most - 1)[:most].tolist() if most else []
        return *told(index), sorted(map(told, first), key=lambda one: -one[1])

    def _new_cache(self, adapter: str) -> _Cache:
        while len(self._caches) >= self._generators:
            self._caches.popitem(last=False)
        return _Cache(self._generator(self._context, self._adapters[adapter] if adapter else ""))

    def _generator(self, length: int, known: str) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=length)
        generator = og.Generator(self._model, params)
        if known:
            generator.set_active_adapter(self._parameters, known)
        return generator

    def _fault(self, known: str) -> str:
        """Why a loaded adapter does not run: one token with it tells."""
        generator = self._generator(8, known)
        try:
            generator.append_tokens(np.zeros(1, dtype=np.int32))
            return "" if np.isfinite(generator.get_logits()).all() else "its numbers are too large"
        except RuntimeError as error:
            return str(error)


class _Run:
    """The text side of one request: what was written, what may be shown, how it ended."""

    def __init__(self, request: Generate, prompt: list[int], cancelled: Callable[[], bool]) -> None:
        self.request, self.prompt, self.cancelled = request, prompt, cancelled
        self.cached = 0
        self.tokens: list[int] = []
        self.finish = ""
        self.logprobs: list[float] = []
        self.told: list[Token] = []  # that no piece has told yet
        self._shown = 0  # bytes of text in pieces, short of those of the tokens that they told
        self._started, self._first = time.perf_counter(), 0.0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._hold = max((len(stop) for stop in request.stop), default=1) - 1

    @property
    def written(self) -> int:
        return len(self.tokens)

    def write(self, raw: bytes, tokens: list[int]) -> None:
        """Take the bytes of tokens; finishes at a stop string."""
        self._first = self._first or time.perf_counter() - self._started
        self.tokens += tokens
        self._held += self._decoder.decode(raw)
        cuts = [at for stop in self.request.stop if stop and (at := self._held.find(stop)) >= 0]
        if cuts:
            self._held, self.finish = self._held[: min(cuts)], "stop"

    def piece(self) -> Piece | None:
        """What can be shown now: all but the characters in which a stop string may have begun."""
        ready = len(self._held) - self._hold
        if self.finish or ready <= 0:
            return None
        text, self._held = self._held[:ready], self._held[ready:]
        return Piece(text, tokens=self._tokens(text))

    def _tokens(self, text: str) -> list[Token]:
        """The tokens that begin in what is shown with this text."""
        self._shown += len(text.encode())
        told = list[Token]()
        while self.told and self._shown > 0:
            told.append(self.told.pop(0))
            self._shown -= len(told[-1].text)
        return told

    def last(self) -> Piece:
        """The rest of the text with the counts."""
        text = (
            self._held if self.request.stop and self.finish == "stop" else self._held + self._decoder.decode(b"", True)
        )
        return Piece(
            text,
            done=True,
            finish=self.finish,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            output_tokens=self.written,
            first_token_s=self._first,
            total_s=time.perf_counter() - self._started,
            mean_logprob=float(np.mean(self.logprobs)) if self.logprobs else 0.0,
            choices=len(self.logprobs),
            tokens=self._tokens(text),
        )


def _shared(cached: list[int], prompt: list[int]) -> int:
    """Leading tokens that both have, short of the prompt's last: at least one must be read again for its logits."""
    limit = min(len(cached), len(prompt) - 1)
    return next((i for i in range(limit) if cached[i] != prompt[i]), limit)
