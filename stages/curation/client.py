"""Asks an endpoint what the ledger does not have yet: several requests at once, again after faults, within a budget.

Every answer is in the ledger before it counts, so a stage that ends in the middle asks only what is missing.
"""

import asyncio
import email.utils
import functools
import random
import ssl
import time
from collections.abc import Mapping
from typing import Any

import httpx

from stages.contract.errors import RESUME, Interrupted, StageFailed, UserError
from stages.curation.endpoint import Endpoint
from stages.curation.ledger import Ledger
from stages.curation.reply import NoReply, read_stream, read_whole
from stages.runtime import heartbeat
from stages.store.files import digest_json
from stages.store.stage import StopRequest

AGAIN = (408, 409, 425, 429)
"""Statuses after which another attempt may succeed, beside 500 and above."""
REFUSED = (400, 413, 422)
"""Statuses that speak of this one request (too long, say); the answer is that there is none."""
MOST_REFUSED = 5
"""Refusals without any answer before them after which the requests, not their texts, must be what is wrong."""
POLL_S = 0.2
"""Seconds between looks at whether the stage has to stop."""


class Client:
    """One endpoint and the ledger of its answers."""

    def __init__(self, endpoint: Endpoint, ledger: Ledger, stop: StopRequest) -> None:
        self._endpoint, self._ledger, self._stop = endpoint, ledger, stop
        self._key = endpoint.key()
        self._answered, self._spent, self._accepted = len(ledger), 0, False
        for document in ledger:
            self._count(document)
        self._refusals: list[tuple[str, dict[str, Any]]] = []
        self._not_before = 0.0

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request for a chat, as far as it decides the answer."""
        e = self._endpoint
        return {**e.body, "model": e.model, "messages": messages, "temperature": e.temperature, "max_tokens": e.max_tokens}

    def ask(self, bodies: list[dict[str, Any]]) -> list[str]:
        """Have an answer in the ledger for every body; returns their keys.

        Raises UserError when the endpoint refuses as a whole or the budget is spent, StageFailed when it keeps failing,
        Interrupted when the stage has to stop.
        """
        keys = [digest_json(body) for body in bodies]
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._ledger}
        if missing:
            asyncio.run(self._ask(missing))
        return keys

    async def _ask(self, missing: Mapping[str, dict[str, Any]]) -> None:
        waiting, bounds = list(missing.items())[::-1], dict[asyncio.Task[None], int]()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx.Timeout(self._endpoint.timeout_s, pool=None)
        limits = httpx.Limits(max_connections=self._endpoint.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, verify=_certificates()) as http:
            try:
                while waiting or bounds:
                    while waiting and len(bounds) < self._endpoint.concurrency and self._affords(waiting[-1][1], bounds):
                        key, body = waiting.pop()
                        bounds[asyncio.create_task(self._one(http, key, body))] = self._bound(body)
                    if not bounds:
                        raise self._budget_spent(len(waiting))
                    done, _ = await asyncio.wait(bounds, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        del bounds[task]
                        task.result()
                    if self._stop.requested:
                        raise Interrupted
            finally:
                for task in bounds:
                    task.cancel()
                await asyncio.gather(*bounds, return_exceptions=True)
        if self._refusals:
            raise self._refused()

    async def _one(self, http: httpx.AsyncClient, key: str, body: dict[str, Any]) -> None:
        fault = NoReply("")
        for attempt in range(self._endpoint.attempts):
            while (left := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(left)
            try:
                self._take(key, await self._send(http, body), self._bound(body))
            except NoReply as caught:
                fault = caught
                await self._wait(key, attempt, fault)
            else:
                return
        what = f"the endpoint {self._endpoint.url} gave no answer in {self._endpoint.attempts} attempts ({fault})"
        raise StageFailed(f"{what}; {self._kept()}, which `{RESUME}` does not ask for again")

    async def _wait(self, key: str, attempt: int, fault: NoReply) -> None:
        e = self._endpoint
        if fault.wait_s is not None:
            if fault.wait_s > e.longest_wait_s:
                raise StageFailed(
                    f"the endpoint {e.url} asks to wait {fault.wait_s:.0f} s ({fault}); {self._kept()}: `{RESUME}`"
                )
            # What one request is told holds for all of them.
            self._not_before = max(self._not_before, time.monotonic() + fault.wait_s)
        elif attempt + 1 < e.attempts:
            spread = random.Random(f"{key}-{attempt}").uniform(0.5, 1.0)  # else those that failed together come back together
            await asyncio.sleep(min(e.longest_wait_s, e.wait_s * 2**attempt) * spread)

    async def _send(self, http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt: the document of the answer. Raises NoReply, or UserError for what no attempt can mend."""
        e = self._endpoint
        url = f"{e.url.rstrip('/')}/chat/completions"
        try:
            if not e.stream:
                async with asyncio.timeout(e.timeout_s):
                    response = await http.post(url, json=body)
                return self._understood(response) or read_whole(self._without_key(response.text))
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async with http.stream("POST", url, json=body | options) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                answer = self._understood(response) or await read_stream(response.aiter_bytes())
                return answer | {"text": self._without_key(answer["text"])} if "text" in answer else answer
        except (httpx.TimeoutException, TimeoutError) as error:
            raise NoReply(f"nothing within {e.timeout_s:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise NoReply(self._without_key(str(error) or type(error).__name__)) from error

    def _understood(self, response: httpx.Response) -> dict[str, Any]:
        """Nothing when there is an answer to read, or the document of a refusal. Raises NoReply and UserError for the rest."""
        status = response.status_code
        if status == httpx.codes.OK:
            return {}
        said = f"{status}: {' '.join(self._without_key(response.text).split())[:200]}"
        if status in AGAIN or status >= 500:
            raise NoReply(said, _retry_after(response))
        if status in REFUSED:
            return {"refused": said, "tokens": 0}
        field, mend = "url", f"check the address and the model's name, and run the recipe again: {self._kept()}"
        if status in (401, 403):
            field, mend = "key_variable", f"check the key in that variable, then `{RESUME}`: {self._kept()}"
        raise UserError(f"the endpoint answered {said}", where=f"rewrite.endpoint.{field}", mend=mend)

    def _take(self, key: str, document: dict[str, Any], bound: int) -> None:
        if document["tokens"] is None:
            document = document | {"tokens": bound}  # it does not say: no more than this
        if "refused" in document and not self._accepted:
            self._refusals.append((key, document))
            if len(self._refusals) >= MOST_REFUSED:
                raise self._refused()
            return
        for each in [*self._refusals, (key, document)]:
            self._ledger.add(*each)
            self._answered += 1
            self._count(each[1])
        self._refusals = []
        heartbeat.progress()

    def _count(self, document: dict[str, Any]) -> None:
        self._spent += document["tokens"]
        self._accepted = self._accepted or "refused" not in document

    def _bound(self, body: dict[str, Any]) -> int:
        return sum(len(text.encode()) for message in body["messages"] for text in message.values()) + self._endpoint.max_tokens

    def _affords(self, body: dict[str, Any], bounds: Mapping[asyncio.Task[None], int]) -> bool:
        e = self._endpoint
        asked = self._answered + len(self._refusals) + len(bounds)
        enough = e.most_requests is None or asked < e.most_requests
        return enough and (e.most_tokens is None or self._spent + sum(bounds.values()) + self._bound(body) <= e.most_tokens)

    def _budget_spent(self, missing: int) -> UserError:
        what = (
            f"the budget is spent ({self._answered} answers, {self._spent} tokens), {missing} answers of this chunk are missing"
        )
        mend = f"raise `most_requests` or `most_tokens` and run the recipe again: {self._kept()}"
        return UserError(what, where="rewrite.endpoint", mend=mend)

    def _refused(self) -> UserError:
        what = f"the endpoint refused every request so far ({self._refusals[0][1]['refused']})"
        return UserError(what, where="rewrite.endpoint", mend="check `model`, `max_tokens` and `body`")

    def _kept(self) -> str:
        return f"the {self._answered} answers that came are kept"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a short answer."""
    return httpx.create_ssl_context()


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: it names a number or a date."""
    text = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):  # a date before the first or after the last that there is
        return None
