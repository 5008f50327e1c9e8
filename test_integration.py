"""Tests of orchestrator.py with real tmux and real processes, through its command line only.

They run where tmux is; those of the real Claude Code and Codex, of the browser and of other
Pythons where these are installed too.  First come the stand-ins for what surrounds the tool:
the models, the agents, a browser, a person's terminal.

    pytest test_integration.py                                all, in some minutes
    BENCHMARK=1 pytest -s -k benchmark test_integration.py    how fast it is
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import http.client
import http.server
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, TypeVar

import pytest

TOOL = Path(__file__).with_name("orchestrator.py")

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal() -> None:
    """Undo that some are ignored, which nohup or a shell with us in the background hands down."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


# -- Shared by the stand-ins --------------------------------------------------------------------

def poll(look: Callable[[], Any], seconds: float) -> Any:
    """Return what look() returns as soon as that is true, or the last false answer in the end."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def processes_of(directory: Path) -> dict[int, bytes]:
    """Return the arguments of the processes that name a scratch directory in them or environ."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):      # gone in the meantime, or not ours to read
            arguments = (entry / "cmdline").read_bytes()
            said = arguments + b"\0" + (entry / "environ").read_bytes()
            if os.fsencode(directory) in said and int(entry.name) != os.getpid():
                found[int(entry.name)] = arguments
    return found


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A short private directory; in the end its processes are ended, then it is removed.

    Sockets in it need the short path, and daemons that outlive their program would write on.
    """
    directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="o"))
    try:
        yield directory
    finally:
        for deadly in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_of(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, deadly)
            if poll(lambda: not processes_of(directory), 3):
                break
        shutil.rmtree(directory, ignore_errors=True)


def found(pattern: str, text: str) -> re.Match[str]:
    """Return the first match of a pattern in a text that has one."""
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in {text!r}"
    return match


def text_of(content: Any) -> str:
    """Return the text of a message, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or "" for part in content or [])


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request, with its path, headers and body, and its answer: JSON or a stream of events."""

    server: Loopback
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.body: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            self.body = json.loads(raw)
        with contextlib.suppress(ConnectionError):      # the client went away
            self.server.answer(self)

    do_GET = do_HEAD = do_POST

    def log_message(self, *args: object) -> None:
        pass

    def send(self, body: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        """Answer at once, with JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        length = {"Content-Length": str(len(data))}
        for header in {"Content-Type": "application/json", **length, **headers}.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def stream(self, text: str) -> None:
        """Send a piece of the stream; an empty one ends it."""
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, kind: str, **data: Any) -> None:
        """Send a piece that is a typed event, as the agents' models do."""
        self.stream(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n")


AnyLoopback = TypeVar("AnyLoopback", bound="Loopback")


class Loopback(http.server.ThreadingHTTPServer):
    """A web server on a free port of this machine; a subclass has what it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.port = self.server_port

    def __enter__(self: AnyLoopback) -> AnyLoopback:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, exchange: Exchange) -> None:
        raise NotImplementedError


# -- The orchestrating model, as OpenRouter serves it -------------------------------------------

class Request(NamedTuple):
    """What a client sent; the names of the headers in any case."""

    headers: Any
    body: dict[str, Any]


class ScriptedModel(Loopback):
    """An OpenRouter API whose nth chat completion is the nth reply of a script.

    A reply is a text, or a list of its pieces, each a text or a function that returns one; or the
    status of an error, or that and its headers; or a function that returns one of these.
    """

    NAME, COST = "anthropic/claude-opus-4.6", 0.01

    def __init__(self, replies: Sequence[Any]) -> None:
        super().__init__()
        self.replies = list(replies)
        self.requests: list[Request] = []      # of chat completions
        self.url = f"http://127.0.0.1:{self.port}/api/v1"
        self._lock = threading.Lock()

    def last_message(self, number: int = -1) -> str:
        """Return the text of the last message of a request, by default the latest."""
        return text_of(self.requests[number].body["messages"][-1]["content"])

    def choose(self, number: int, messages: Sequence[Any]) -> Any:
        """Return the reply to the nth request."""
        return self.replies[number] if number < len(self.replies) else "TASK_FAILED: script ended"

    def answer(self, exchange: Exchange) -> None:
        path = urllib.parse.unquote(exchange.path)
        if "somebody-else" in exchange.headers.get("Authorization", ""):
            exchange.send({"error": {"code": 401, "message": "User not found."}}, 401)
            return
        if path == "/api/v1/models":
            exchange.send({"data": [{"id": self.NAME}]})
            return
        if path != "/api/v1/chat/completions":
            exchange.send({"error": {"code": 404, "message": "Not Found"}}, 404)
            return
        if not exchange.body:       # whoever asks was killed in the middle of it
            return
        with self._lock:
            number = len(self.requests)
            self.requests.append(Request(exchange.headers, exchange.body))
        reply = self.choose(number, exchange.body["messages"])
        if callable(reply):
            reply = reply()
        if isinstance(reply, (str, list)):
            self._complete(exchange, number, reply)
            return
        status, headers = reply if isinstance(reply, tuple) else (reply, {})
        exchange.send({"error": {"code": status, "message": "as scripted"}}, status, headers)

    def _complete(self, exchange: Exchange, number: int, reply: Any) -> None:
        parts = [reply] if isinstance(reply, str) else reply
        prompt = len(json.dumps(exchange.body["messages"])) // 4
        completion = len(str(reply)) // 4 + 1
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "cost": self.COST,
                 "total_tokens": prompt + completion,
                 "prompt_tokens_details": {"cached_tokens": prompt // 2 if number else 0}}
        head = {"id": f"gen-{number}", "created": int(time.time()), "provider": "Stand-in",
                "object": "chat.completion.chunk", "model": exchange.body["model"]}

        def chunk(content: str, reason: str | None = None) -> dict[str, Any]:
            delta = {"role": "assistant", "content": content}
            return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

        exchange.start_stream()
        exchange.stream(": OPENROUTER PROCESSING\n\n")
        for part in parts:
            for text in re.findall(r"(?s).{1,24}", part() if callable(part) else part):
                exchange.stream(f"data: {json.dumps(chunk(text))}\n\n")
        for end in (chunk("", "stop"), {**head, "choices": [], "usage": usage}):
            exchange.stream(f"data: {json.dumps(end)}\n\n")
        exchange.stream("data: [DONE]\n\n")
        exchange.stream("")


class Overseer(ScriptedModel):
    """A model that has the agent do so many things, each once, going by what it is shown.

    Where it is not shown that the last one was done, it asks before it repeats anything.
    """

    def __init__(self, count: int) -> None:
        super().__init__([])
        self.count = count

    def choose(self, number: int, messages: Sequence[Any]) -> Any:
        texts = [text_of(message["content"]) for message in messages]
        done: set[str] = set()
        shown = "\n".join(texts[index] for index in range(len(texts)) if index % 2)
        for did, recalled in re.findall(r"(?m)^did (\d+)$|^recalled:(.*)$", shown):
            done = done | {did} if did else set(recalled.split())
        if "Summarise the session" in texts[-1]:
            return f"Much was done.\nrecalled: {' '.join(sorted(done))}"
        if "facts remembered" in texts[0]:
            return "no"
        last = found(r"\w+( \d+)?\Z", texts[-2])[0] if len(texts) > 2 else ""
        if last == "recall" and "recalled:" not in texts[-1] or \
                last.startswith("do ") and last[3:] not in done:
            return "recall"
        left = [n for n in range(1, self.count + 1) if str(n) not in done]
        return f"MEMORY_SAVE: fact {left[0]}\ndo {left[0]}" if left else "TASK_COMPLETE"


# -- The model behind the agents, and the real agents -------------------------------------------

class Step(NamedTuple):
    """What an agent is told to do next: run a command, or (where that is empty) say something."""

    command: str
    answer: str = ""


def next_step(message: str, results: int) -> Step:
    """Read the step from the message, given how many commands were run for it.

    First each RUN[command], then SAY[text] or LINES[number].
    """
    asked = re.findall(r"(?s)\b(RUN|SAY|LINES)\[(.*?)\]", message)
    commands = [text for word, text in asked if word == "RUN"]
    if results < len(commands):
        return Step(commands[results])
    said = dict(asked)
    count = int(said.get("LINES", 0))
    lines = "\n".join(f"line {number} of {count}" for number in range(1, count + 1))
    return Step("", lines or said.get("SAY", "done: " + message[-60:]))


class AgentApi(Loopback):
    """The model behind the real Claude Code and Codex; what they are told to do says its answer."""

    HIDDEN = ("<system-reminder>", "<environment_context>")     # what the agents themselves add
    PASTED = re.compile(r'(?s)\s*<pasted_content id="\w+">\n(.*)\n</pasted_content[^>]*>\n')
    SHELLS = {"Bash": "command", "exec_command": "cmd", "shell_command": "command"}

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []       # as they left the agents, one for each turn
        self.conversation = ""              # all that the latest turn began with
        self.calls = 0
        self.times: list[tuple[float, float]] = []      # when each turn was asked and answered

    def answer(self, exchange: Exchange) -> None:
        asked = time.time()
        path = exchange.path.split("?")[0]
        speak = {"/v1/messages": self._as_anthropic, "/v1/responses": self._as_openai}.get(path)
        if not speak:
            exchange.send({"data": [], "input_tokens": 10})
            return
        self.calls += 1
        tools = [tool.get("name") for tool in exchange.body.get("tools", [])]
        shell = next((name for name in self.SHELLS if name in tools), "")
        message, results = self._heard(exchange.body)
        if shell and not results:
            self.messages.append(message)
            self.conversation = json.dumps(exchange.body)
        exchange.start_stream()
        speak(exchange, shell, next_step(message, results) if shell else Step("", "a title"))
        exchange.stream("")
        if shell:
            self.times.append((asked, time.time()))

    def _heard(self, body: dict[str, Any]) -> tuple[str, int]:
        """Return the latest message, and how many commands were run since."""
        message, results = "", 0
        for item in body.get("messages") or body["input"]:
            parts = item.get("content") or []
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            kinds = [item.get("type"), *(part["type"] for part in parts)]
            done = sum(kind in ("tool_result", "function_call_output") for kind in kinds)
            said = [part for part in parts if not text_of([part]).startswith(self.HIDDEN)]
            if done:
                results += done
            elif said and item.get("role") == "user":
                message, results = self.PASTED.sub(r"\1", text_of(said)), 0
        return message, results

    def _pieces(self, step: Step) -> Iterator[str]:
        pieces = re.findall(r"\S*\s*", step.answer)[:-1]
        for piece in pieces:
            yield piece
            time.sleep(0.3 / len(pieces))

    def _as_anthropic(self, exchange: Exchange, shell: str, step: Step) -> None:
        stop = {"stop_reason": "tool_use" if step.command else "end_turn", "stop_sequence": None}
        if step.command:
            name = f"toolu_{time.time_ns()}"
            block = {"type": "tool_use", "id": name, "name": shell, "input": {}}
            wish = {self.SHELLS[shell]: step.command, "description": "as it was told"}
            deltas = iter([{"type": "input_json_delta", "partial_json": json.dumps(wish)}])
        else:
            block = {"type": "text", "text": ""}
            deltas = ({"type": "text_delta", "text": piece} for piece in self._pieces(step))
        exchange.event("message_start", message={
            "id": f"msg_{time.time_ns()}", "type": "message", "role": "assistant", "content": [],
            "model": exchange.body["model"], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": 100, "output_tokens": 1}})
        exchange.event("content_block_start", index=0, content_block=block)
        for delta in deltas:
            exchange.event("content_block_delta", index=0, delta=delta)
        exchange.event("content_block_stop", index=0)
        exchange.event("message_delta", delta=stop, usage={"output_tokens": 20})
        exchange.event("message_stop")

    def _as_openai(self, exchange: Exchange, shell: str, step: Step) -> None:
        response = {"id": f"resp_{time.time_ns()}"}
        exchange.event("response.created", response=response)
        item: dict[str, Any]
        if step.command:
            wish = json.dumps({self.SHELLS[shell]: step.command, "yield_time_ms": 30_000})
            item = {"type": "function_call", "id": "fc_1", "call_id": f"call_{time.time_ns()}",
                    "name": shell, "arguments": wish}
        else:
            item = {"type": "message", "role": "assistant", "id": "msg_1", "content": []}
            exchange.event("response.output_item.added", output_index=0, item=item)
            for piece in self._pieces(step):
                exchange.event("response.output_text.delta", item_id="msg_1", output_index=0,
                               content_index=0, delta=piece)
            item = {**item, "content": [{"type": "output_text", "text": step.answer}]}
        exchange.event("response.output_item.done", output_index=0, item=item)
        exchange.event("response.completed", response={**response, "usage": {
            "input_tokens": 10, "output_tokens": 5, "total_tokens": 15}})


CODEX_CONFIG = """\
model_provider = "standin"
model = "gpt-5"
check_for_update_on_startup = false
[model_providers.standin]
name = "standin"
base_url = "http://127.0.0.1:PORT/v1"
wire_api = "responses"
env_key = "STANDIN_KEY"
[analytics]
enabled = false
"""
WRAPPER = """\
#!/bin/sh
exec env -i HOME=HERE/home TMPDIR=HERE/tmp PATH="INSTALLED:$PATH" \\
  TERM="${TERM:-xterm-256color}" LANG=C.UTF-8 ${TMUX:+TMUX="$TMUX"} IS_SANDBOX=1 \\
  ${CLAUDE_CODE_DISABLE_ALTERNATE_SCREEN:+CLAUDE_CODE_DISABLE_ALTERNATE_SCREEN=1} \\
  ANTHROPIC_BASE_URL=http://127.0.0.1:PORT ANTHROPIC_API_KEY=sk-ant-standin-0123456789abcdefghij \\
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1 DISABLE_TELEMETRY=1 \\
  DISABLE_ERROR_REPORTING=1 STANDIN_KEY=x INSTALLED/NAME "$@"
"""


@contextlib.contextmanager
def real_agents(api_port: int) -> Iterator[Path]:
    """A directory for PATH with the real `claude` and `codex`, logged in to an AgentApi.

    They are looked for in $ORCHESTRATOR_AGENTS (default ~/.cache/orchestrator-agents), made by
    `npm install --prefix ~/.cache/orchestrator-agents @anthropic-ai/claude-code @openai/codex`.
    """
    place = os.environ.get("ORCHESTRATOR_AGENTS") or "~/.cache/orchestrator-agents"
    installed = Path(place).expanduser() / "node_modules" / ".bin"
    for name in ("claude", "codex"):
        if not os.access(installed / name, os.X_OK):
            pytest.skip(f"the real agents are not installed: no {installed / name}")
    with scratch_directory() as here:
        for folder in ("bin", "tmp", "home/.codex"):
            (here / folder).mkdir(parents=True)
        (here / "home/.claude.json").write_text(json.dumps({
            "hasCompletedOnboarding": True, "theme": "dark",
            "customApiKeyResponses": {"approved": ["0123456789abcdefghij"], "rejected": []}}))
        (here / "home/.codex/config.toml").write_text(CODEX_CONFIG.replace("PORT", str(api_port)))
        for name in ("claude", "codex"):
            script = WRAPPER.replace("HERE", str(here)).replace("PORT", str(api_port))
            script = script.replace("INSTALLED", str(installed)).replace("NAME", name)
            (here / "bin" / name).write_text(script)
            (here / "bin" / name).chmod(0o755)
        yield here / "bin"


# -- A browser ----------------------------------------------------------------------------------

class Browser:
    """A headless Chromium with one tab, driven through a pipe; `console` is what went wrong."""

    FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
             "--remote-debugging-pipe")

    def __init__(self) -> None:
        names = ("chromium", "chromium-browser", "google-chrome")
        self.program = next(filter(None, map(shutil.which, names)), "")
        self._console: list[str] = []
        self._numbers, self._unread = 0, b""
        self._session: dict[str, str] = {}

    def __enter__(self) -> Browser:
        if not self.program:
            pytest.skip("no Chromium is installed (apt-get install chromium)")
        with contextlib.ExitStack() as stack:
            self._start(stack.enter_context(scratch_directory()), stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def console(self) -> list[str]:
        """The errors, exceptions and violated policies so far."""
        self._call("Runtime.evaluate", expression="0")      # what came before is read with it
        return self._console

    def open(self, url: str) -> None:
        """Go there, and wait until it has loaded."""
        failure = self._call("Page.navigate", url=url).get("errorText")
        assert not failure, f"{url}: {failure}"
        assert poll(lambda: self.evaluate("document.readyState === 'complete'"), 15), url

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, of a promise its outcome."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True,
                            returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {self._thrown(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def size(self, width: int, height: int) -> None:
        """Make the window as large as this."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                   deviceScaleFactor=1, mobile=False)

    def ignore_certificates(self) -> None:
        """Take certificates that nobody has signed."""
        self._call("Security.setIgnoreCertificateErrors", ignore=True)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press Tab, Enter or Escape."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, "")}[key]
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                       windowsVirtualKeyCode=code, modifiers=8 if shift else 0)

    def colours(self, scheme: str) -> None:
        """Prefer the dark or the light colours from now on."""
        self._call("Emulation.setEmulatedMedia",
                   features=[{"name": "prefers-color-scheme", "value": scheme}])

    @contextlib.contextmanager
    def before_each_page(self, script: str) -> Iterator[None]:
        """Run a script in each page that is opened, before its own."""
        added = self._call("Page.addScriptToEvaluateOnNewDocument", source=script)
        yield
        self._call("Page.removeScriptToEvaluateOnNewDocument", **added)

    @contextlib.contextmanager
    def tabs(self, count: int) -> Iterator[Callable[[int], None]]:
        """Open more tabs; what is yielded brings one to the front, the others are hidden then."""
        first, tabs = self._session, []
        for _ in range(count):
            self._session = {}
            target = self._call("Target.createTarget", url="about:blank")
            session = self._call("Target.attachToTarget", flatten=True, **target)["sessionId"]
            tabs.append((target, {"sessionId": session}))

        def show(number: int) -> None:
            target, self._session = tabs[number]
            self._call("Target.activateTarget", **target)
            assert poll(lambda: self.evaluate("document.visibilityState") == "visible", 15)

        try:
            yield show
        finally:
            for target, self._session in tabs:
                self._call("Target.closeTarget", **target)
            self._session = first

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        for letter in text:
            self._call("Input.dispatchKeyEvent", type="char", text=letter)

    def _start(self, home: Path, stack: contextlib.ExitStack) -> None:
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        # It reads from 3 and writes to 4; what is moved there must not lie there already.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (its_in, its_out)]
        moves = [(os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(high, (3, 4))]
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        command = [self.program, *self.FLAGS.split(), f"--user-data-dir={home}", "about:blank"]
        env = {**os.environ, "HOME": str(home), "TMPDIR": str(home)}
        pid = os.posix_spawn(self.program, command, env, file_actions=[*quiet, *moves], setpgroup=0)
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.killpg, pid, signal.SIGKILL)
        for end in (its_in, its_out, *high):
            os.close(end)
        for end in (self._in, self._out):
            stack.callback(os.close, end)
        tab = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._numbers += 1
        message = {"id": self._numbers, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._numbers:
            self._notice(answer.get("method", ""), answer.get("params", {}))
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._in], [], [], 30)[0], "the browser does not answer"
            data = os.read(self._in, 1 << 16)
            assert data, "the browser has ended"
            self._unread += data
        message, self._unread = self._unread.split(b"\0", 1)
        received: dict[str, Any] = json.loads(message)
        return received

    def _notice(self, event: str, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self._console.append(self._thrown(about["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            values = (a.get("value", a.get("description")) for a in about["args"])
            self._console.append(" ".join(map(str, values)))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self._console.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def _thrown(self, details: dict[str, Any]) -> str:
        return str(details.get("exception", {}).get("description") or details["text"])


# -- A person at a terminal ---------------------------------------------------------------------

class Terminal:
    """A command in a terminal of 120x40, a tmux server of its own; `env` is all that it sees."""

    def __init__(self, command: Sequence[Any], env: Mapping[str, str], cwd: Path) -> None:
        self.command, self.env, self.cwd = command, env, cwd

    def __enter__(self) -> Terminal:
        with contextlib.ExitStack() as stack:
            self._directory = stack.enter_context(scratch_directory())
            env = {**self.env, "TERM": "screen-256color"}
            options = {"remain-on-exit": "on", "history-limit": "20000"}
            self._tmux("-f", os.devnull, "start-server", ";",
                       *(word for pair in options.items() for word in ("set", "-g", *pair, ";")),
                       "new-session", "-x", "120", "-y", "40", "-d", "-c", str(self.cwd), "--",
                       "env", "-i", *(f"{name}={value}" for name, value in env.items()),
                       *map(str, self.command))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(AssertionError):       # it may have ended already
            self._tmux("kill-server")
        self._stack.close()

    def type(self, text: str) -> None:
        """Type it, without an Enter."""
        if text:
            self._tmux("send-keys", "-l", "--", re.sub(r";\Z", r"\;", text))

    def enter(self, text: str) -> None:
        """Type a line."""
        self.type(text)
        self.send_keys("Enter")

    def paste_text(self, text: str, *, brackets: bool) -> None:
        """Paste text, with brackets around it if the program wants them."""
        file = self._directory / "pasted"
        file.write_text(text, encoding="utf-8")
        self._tmux("load-buffer", str(file), ";", "paste-buffer", *["-p"] * brackets)

    def send_keys(self, *keys: str) -> None:
        """Press keys, by the names that tmux gives them."""
        self._tmux("send-keys", *keys)

    def screen(self) -> str:
        """Return what the screen shows, below what has scrolled off it."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def wait_for(self, text: str, seconds: float = 15) -> str:
        """Return the screen once the text is on it."""
        assert poll(lambda: text in self.screen(), seconds), (
            f"{text!r} is not shown within {seconds:g} s, but:\n{self.screen()}")
        return self.screen()

    def exit_status(self, seconds: float = 15) -> int:
        """Wait for the command to end; return its status."""
        status = poll(self._ended, seconds)
        assert status, f"it has not ended within {seconds:g} s:\n{self.screen()}"
        return int(status)

    def _ended(self) -> str:
        facts = self._tmux("display-message", "-p", "#{pane_dead},#{pane_dead_status},#{pid}")
        dead, status, server = facts.split(",")
        if dead == "1" and not status:
            os.kill(int(server), signal.SIGCHLD)    # Debian's tmux may have missed the first
        return status

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", *words], capture_output=True, text=True, timeout=10,
                              stdin=subprocess.DEVNULL, env={
                                  "PATH": os.environ["PATH"], "LANG": "C.UTF-8",
                                  "TMUX_TMPDIR": str(self._directory)})
        assert not done.returncode, f"tmux {words[0]}: {done.stderr.strip()}"
        return "\n".join(line.rstrip() for line in done.stdout.splitlines()).rstrip()


# -- A small agent ------------------------------------------------------------------------------

AGENT = r'''
"""A small agent: on a terminal it does what the real ones do; agent.log has what it took.

What it is like is said by AGENT_START (orders before it is ready), AGENT_SIGN (title, footer,
still or none), AGENT_PASTE (brackets or plain), AGENT_EATS (how many Enters of a message it loses),
AGENT_DEAF (seconds after a paste in which an Enter is but a new line), AGENT_SLOW (seconds that it
takes for a paste), AGENT_THINKS (seconds before it does anything) and AGENT_BOX (a frame like that
of Claude Code around its prompt).
"""
import itertools, json, os, random, re, select, termios, threading, time, tty

def setting(name, default):
    return type(default)(os.environ.get("AGENT_" + name, default))

def show(text):
    os.write(1, text.encode())

def log(**facts):
    with open("agent.log", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "at": time.time(), **facts}) + "\n")

def keyboard():
    while True:
        yield from os.read(0, 1 << 16)

def take():
    read, pasting, pasted, since, eaten = bytearray(), False, 0, 0.0, 0
    for byte in KEYS:
        read.append(byte)
        if byte == 0x7e and read.endswith((b"\x1b[200~", b"\x1b[201~")):
            pasting = read.endswith(b"0~")
            if pasting:
                pasted = len(read)
                continue
            time.sleep(setting("SLOW", 0.0))
            text, since = read[pasted:-6].decode(errors="replace"), time.monotonic()
            show(f"[Pasted text #1 +{text.count(chr(10))} lines]{RIM}" if len(text) > 5000
                 else text.replace("\n", "\n\x1b[K  ") + RIM)
        elif pasting:
            continue
        elif byte != 0x0d:
            os.write(1, b"" if re.search(rb"\x1b\[?\d*$", read[-6:]) else bytes([byte]))
        elif time.monotonic() - since < setting("DEAF", 0.0):
            show("\n\x1b[K  " + RIM)
        elif eaten < setting("EATS", 0):
            eaten += 1
        else:
            text = read.replace(b"\x1b[200~", b"").replace(b"\x1b[201~", b"").replace(b"\r", b"")
            log(took=text.decode(errors="replace"), read=read.decode(errors="replace"))
            return text.decode(errors="replace")

class Sign:
    def __init__(self):
        kind, rows = setting("SIGN", "title"), os.get_terminal_size().lines
        foot = f"\x1b7\x1b[{rows};1H\x1b[K%s\x1b8"
        self.busy, self.idle = {
            "title": ("\x1b]0;%s agent\x07", "\x1b]0;agent\x07"), "none": ("%.0s", ""),
            "footer": (foot % "  %s · esc to interrupt", foot % "  ? for shortcuts"),
            "still": (foot % "  %.0sesc to interrupt", foot % "  ? for shortcuts")}[kind]
        if kind in ("footer", "still"):
            show(f"\x1b[2J\x1b[1;{rows - 1}r\x1b[H")
        self.frozen = False
        show("\x1b]0;agent\x07" + self.idle)

    def start(self):
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.spin, daemon=True)
        self.thread.start()

    def spin(self):
        for frame in itertools.cycle("⠋⠙⠹⠸⠼⠴⠦⠧"):
            show("" if self.frozen else self.busy % frame)
            if self.over.wait(0.1):
                return

    def stop(self):
        self.over.set()
        self.thread.join()
        show(self.idle)

def obey(order, turn):
    word, _, rest = order.strip().partition(" ")
    if word == "echo":
        show(rest + "\n")
    elif word == "write":
        show(rest.encode("latin-1", "backslashreplace").decode("unicode_escape"))
    elif word == "lines":
        show("".join(f"line {number} of {rest}\n" for number in range(1, int(rest) + 1)))
    elif word == "count":
        show(f"{turn} of 99\n")
    elif word == "sleep":
        time.sleep(float(rest))
    elif word == "work":        # until Escape
        while next(KEYS) != 0x1b:
            pass
        show("Interrupted by the user\n")
    elif word == "freeze":
        SIGN.frozen = True
        time.sleep(float(rest))
        SIGN.frozen = False
    elif word == "ask":
        SIGN.stop()
        show(f"Sure?\n❯ {rest}\n  No\x1b[A\r\x1b[{len(rest) + 2}C")
        log(answered=chr(next(KEYS)))
        show("\n\n")
        SIGN.start()
    elif word == "choose":
        choose(*rest.split("/"))
    elif word == "do" and rest.isdigit():
        time.sleep(random.choice((0, 0, 1)))
        with open("did", "a") as file:
            file.write(rest + "\n")
        show(f"did {rest}\n")
    elif word == "recall":
        show(f"recalled: {' '.join(open('did').read().split()) if os.path.exists('did') else ''}\n")
    elif word == "die":
        os._exit(int(rest))

def choose(question, *options):
    """Ask as Claude Code does at its start; the answer at first marked has a star."""
    at = [option[0] for option in options].index("*")
    options = [option.lstrip("*") for option in options]
    rows = [question, *options, "Enter to confirm · Esc to cancel"]
    key = ""
    while key != "\r":
        at = min(max(at + {"A": -1, "B": 1}.get(key, 0), 0), len(options) - 1)
        rows[1:-1] = [f"{'❯ ' if row == at else '  '}{text}" for row, text in enumerate(options)]
        show("\n".join(rows) + f"\x1b[{len(rows) - 1}A\r")
        key = chr(next(KEYS))
        show("\x1b[J")
    log(chose=options[at])
    if options[at].endswith("No, exit"):
        os._exit(1)

tty.setraw(0)
mode = termios.tcgetattr(0)
mode[tty.OFLAG] |= termios.OPOST
termios.tcsetattr(0, termios.TCSANOW, mode)
KEYS = keyboard()
RIM = f"\x1b7\r\n{'─' * 40}\x1b8" if setting("BOX", "") else ""
for order in setting("START", "").split("&&"):
    obey(order, 0)
early = select.select([0], [], [], 0)[0] and os.read(0, 999).decode()
SIGN = Sign()
show("\x1b[?2004h" if setting("PASTE", "brackets") == "brackets" else "")
show("A small agent.\n\n")
log(started=True, early=early or "")
for turn in itertools.count(1):
    show(f"{'─' * 40}\n❯ {RIM}" if RIM else "❯ ")
    message = take()
    show("\n\x1b[J" if RIM else "\n")
    SIGN.start()
    time.sleep(setting("THINKS", 0.2))
    for order in message.replace("\n", "&&").split("&&"):
        obey(order, turn)
    SIGN.stop()
    log(done=message)
'''


# -- The tool at work ---------------------------------------------------------------------------

KEY = "sk-or-v1-2f6c0f3b9d5e4a718c"
Event = dict[str, Any]


class Done(NamedTuple):
    """How a run has ended."""

    status: int
    stdout: str
    stderr: str


class Answer(NamedTuple):
    """What the dashboard answered."""

    status: int
    headers: http.client.HTTPMessage
    text: str


class Site:
    """The dashboard, as a client without a browser sees it."""

    def __init__(self, url: str) -> None:
        self.url, parts = url, urllib.parse.urlsplit(url)
        self.host, self.entrance = parts.netloc, f"{parts.path}?{parts.query}"
        self.cookie = self.ask(self.entrance, cookie="").headers["Set-Cookie"].split(";")[0]

    def ask(self, path: str, body: Any = None, *, cookie: str | None = None,
            **headers: str) -> Answer:
        """Ask for a path, or send JSON to it, as a visitor who has the cookie."""
        with self._open(path, body, cookie, headers) as answer:
            return Answer(answer.status, answer.headers, answer.read().decode())

    def control(self, action: str, text: str = "") -> int:
        """Step in; return the status of the answer."""
        return self.ask("/control", {"action": action, "text": text}).status

    def events(self, until: Callable[[Event], Any], **headers: str) -> list[Event]:
        """Read the stream up to an event; return what was kept of it, each with its stream id."""
        found: list[Event] = []
        for event in self.each(**headers):
            found.append(event)
            if until(event):
                return found
        raise AssertionError(f"the stream has ended after {len(found)} events")

    def each(self, **headers: str) -> Iterator[Event]:
        """Yield the kept events of the stream, each with its stream id, until it ends."""
        with self._open("/events", None, None, headers) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            for line in answer:
                field, _, value = line.decode().strip().partition(": ")
                if field == "id":
                    number = value
                elif field == "data" and "id" in json.loads(value):
                    yield {**json.loads(value), "stream id": number}

    @contextlib.contextmanager
    def _open(self, path: str, body: Any, cookie: str | None,
              headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        sent = {"Cookie": getattr(self, "cookie", "") if cookie is None else cookie,
                **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = None
        if body is not None:
            data = json.dumps(body)
            sent = {"Origin": f"http://{self.host}", "Content-Type": "application/json", **sent}
        connection = http.client.HTTPConnection(self.host, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST" if data else "GET", path, data, sent)
            yield connection.getresponse()


class Run:
    """The tool in a process of its own, with its output in files."""

    def __init__(self, command: Sequence[str], stdin: str | None, out: Path, cwd: Path,
                 env: Mapping[str, str]) -> None:
        self._files = [out.with_suffix(".stdout"), out.with_suffix(".stderr")]
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=dict(env), stdout=stdout, stderr=stderr, text=True,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                start_new_session=True)
        if stdin is not None:
            self.type(stdin)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What it has complained about so far."""
        return self._files[1].read_text(encoding="utf-8")

    def type(self, text: str) -> None:
        """Write to its standard input."""
        assert self.process.stdin
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def site(self) -> Site:
        """Return its dashboard, once it has said where that is."""
        line = re.compile(r"^Dashboard: (http:\S+)\n", re.M)
        said = poll(lambda: line.search(self.stdout + self.stderr), 30)
        assert said, self.stdout + self.stderr
        return Site(said[1])

    def end(self, seconds: float = 90, *, by: int = 0) -> Done:
        """Wait for the end, which a signal may bring about; standard input is at its end."""
        if by:
            self.process.send_signal(by)
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"it has not ended within {seconds} s:\n{self.stdout}\n{self.stderr}")
        return Done(self.process.returncode, self.stdout, self.stderr)


class World:
    """A private machine for the tool: its directories, tmux server, settings and models."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory, self._stack, self._runs = directory, stack, 0
        self.said: ScriptedModel        # of `at_once`
        self.work, self.home, self.tmp = (directory / name for name in ("work", "home", "tmp"))
        for folder in (self.work, self.home, self.tmp):
            folder.mkdir()
        agent = directory / "agent.py"
        agent.write_text(AGENT, encoding="utf-8")
        stack.callback(self.tmux, "kill-server")
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(self.tmp),
            "TMUX_TMPDIR": str(directory), "XDG_STATE_HOME": str(directory / "state"),
            "LANG": "C.UTF-8", "TERM": "xterm-256color", "DASHBOARD_OPEN": "false",
            "OPENROUTER_BASE_URL": "http://127.0.0.1:9/v1", "OPENROUTER_API_KEY": KEY,
            "CONFIRM_COMPLETE": "false",        # one TASK_COMPLETE ends a run
            "CLAUDE_CMD": shlex.join([sys.executable, str(agent)])}

    def model(self, *replies: Any) -> ScriptedModel:
        """Have the runs from now on directed by a model that says this."""
        model = self._stack.enter_context(ScriptedModel(replies))
        self.env["OPENROUTER_BASE_URL"] = model.url
        return model

    def start(self, *arguments: str, stdin: str | None = None, cwd: Path | None = None,
              python: str = sys.executable, within: Sequence[str] = (), **settings: str) -> Run:
        """Start the tool in the work directory, with these arguments and settings.

        `within` is a command that runs the tool, where it shall not be ours to do so.
        """
        self._runs += 1
        command = [*within, python, str(TOOL), *arguments]
        run = Run(command, stdin, self.directory / f"run-{self._runs}", cwd or self.work,
                  {**self.env, **settings})
        self._stack.callback(run.process.wait)
        self._stack.callback(run.process.kill)
        return run

    def run(self, *arguments: str, **how: Any) -> Done:
        """Start the tool, and wait until it has ended."""
        return self.start(*arguments, **how).end()

    def program(self, name: str, script: str) -> str:
        """Make a shell script the program of that name; return the PATH with it."""
        programs = self.directory / "programs"
        programs.mkdir(exist_ok=True)
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
        return f"{programs}:{self.env['PATH']}"

    def journals(self) -> list[Path]:
        """Return the journals of all runs, the newest last."""
        return sorted(self.directory.glob("state/orchestrator/runs/*.jsonl"))

    def events(self, *kinds: str) -> list[Event]:
        """Return the events of the latest run, all or those of some kinds."""
        lines = self.journals()[-1].read_bytes().split(b"\n")[:-1] if self.journals() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if not kinds or event["type"] in kinds]

    def log(self, fact: str) -> list[Any]:
        """Return what the small agents have logged: all that was `took`, is `done`, or a `pid`."""
        path = self.work / "agent.log"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [entry[fact] for entry in map(json.loads, lines) if fact in entry]

    def taken(self, message: str) -> bool:
        """Whether the agent takes a message, within half a minute."""
        return bool(poll(lambda: message in self.log("took"), 30))

    def tmux(self, *words: str) -> str:
        """Ask the server on which the agents' sessions are; a failure is an empty answer."""
        done = subprocess.run(["tmux", "-L", "gt-claude-loop", *words], env=self.env, text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=10)
        return done.stdout.strip()

    def everything(self) -> str:
        """Return all that was printed and kept by the runs so far."""
        files = [*self.directory.glob("run-*"), *self.directory.glob("state/**/*")]
        return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


@pytest.fixture
def new_world() -> Iterator[Callable[[], World]]:
    """More than one world, for what goes on at the same time."""
    with contextlib.ExitStack() as stack:
        yield lambda: World(stack.enter_context(scratch_directory()), stack)


@pytest.fixture
def world(new_world: Callable[[], World]) -> World:
    return new_world()


def at_once(new_world: Callable[[], World], cases: Mapping[str, Sequence[Any]], *,
            limit: float = 120, prepare: Callable[[World, str], Mapping[str, str]] | None = None,
            **more: str) -> dict[str, World]:
    """Run cases beside each other, each in a world of its own, and wait until all are complete.

    A case is the replies of its model and at their end, if need be, its settings; `prepare` may
    return more of them.
    """
    runs, worlds = {}, {}
    for name, case in cases.items():
        *replies, settings = case if isinstance(case[-1], dict) else (*case, {})
        worlds[name] = world = new_world()
        world.said = world.model(*replies, "TASK_COMPLETE")
        own = prepare(world, name) if prepare else {}
        runs[name] = world.start("--task", name, **{**more, **settings, **own})
    for name, run in runs.items():
        done = run.end(limit)
        assert (done.status, done.stderr) == (0, ""), (name, done)
    return worlds


def as_claude(world: World, name: str = "") -> dict[str, str]:
    """Have the small agent run as Claude Code."""
    agent = world.program("claude", f'exec {world.env["CLAUDE_CMD"]}')
    return {"CLAUDE_CMD": "", "AGENT_BOX": "1", "PATH": agent}


class Gate(threading.Event):
    """A reply that the model gives only once the test lets it."""

    def reply(self, text: str) -> Callable[[], str]:
        """Return the reply for a script."""
        return lambda: text if self.wait(60) else "TASK_FAILED: the gate stayed shut"


def kinds(events: Sequence[Event], *without: str) -> list[str]:
    """Return what happened, in its order."""
    return [event["type"] for event in events if event["type"] not in without]


def assert_refused(done: Done, status: int, *words: str) -> None:
    """It ended before it began, with one complaint that has all these words."""
    assert (done.status, done.stdout) == (status, ""), done
    assert_one_complaint(done, *words)


def assert_one_complaint(done: Done, *words: str) -> None:
    """The only line on standard error is one of ours that has all these words."""
    assert re.fullmatch(r"orchestrator: .*\n", done.stderr), done.stderr
    assert [word for word in words if word not in done.stderr] == [], done.stderr


@pytest.fixture
def asked_for() -> None:
    if not os.environ.get("BENCHMARK"):
        pytest.skip("BENCHMARK=1 is not set")


# -- The demo -----------------------------------------------------------------------------------

def assert_nothing_is_left(world: World) -> None:
    assert list(world.tmp.iterdir()) == []
    assert list(world.directory.glob("tmux-*/*")) == []
    assert poll(lambda: not processes_of(world.directory), 5), processes_of(world.directory)


def test_the_demo_completes_again_and_again_without_a_terminal_and_in_one(world: World) -> None:
    done = world.start("--demo", CLAUDE_CMD="", OPENROUTER_API_KEY="").end(30)
    assert (done.status, done.stderr) == (0, "")
    assert "all checks passed" in done.stdout and "Task complete" in done.stdout
    assert_nothing_is_left(world)
    with Terminal([sys.executable, TOOL, "--demo"], world.env, world.work) as terminal:
        assert terminal.exit_status(30) == 0
        screen = terminal.screen()
    assert "Task complete: 6 iterations" in screen and "Dashboard: http://127.0.0.1:" in screen
    assert_nothing_is_left(world)
    assert list(world.work.iterdir()) == []


def test_the_demo_completes_however_the_file_is_run(world: World) -> None:
    """By its name, a link, a pipe, a process substitution, as a zip archive, by uv and by pipx."""
    link, archive = world.directory / "orchestrator", world.directory / "orchestrator.pyz"
    link.symlink_to(TOOL)
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.write(TOOL, "__main__.py")
    (world.home / "python3").symlink_to(sys.executable)
    commands = [f"{TOOL} --demo", f"{link} --demo", f"cat {TOOL} | python3 - --demo",
                f"python3 <(cat {TOOL}) --demo", f"python3 {archive} --demo"]
    for runner in ("uv", "pipx"):
        if shutil.which(runner):
            commands.append(f"{runner} run {TOOL} --demo")
    env = {**world.env, "PATH": f"{world.home}:{world.env['PATH']}"}
    runs = [(command, Run(["bash", "-c", command], None, world.directory / f"demo-{number}",
                          world.work, env)) for number, command in enumerate(commands)]
    for command, run in runs:
        done = run.end(60)
        assert (done.status, done.stderr) == (0, ""), (command, done)
        assert "all checks passed" in done.stdout and "Task complete" in done.stdout, command
    for lock in world.tmp.glob("uv-*.lock"):
        lock.unlink()
    assert_nothing_is_left(world)


def test_a_chat_reads_the_terminal_if_standard_input_is_the_program(world: World) -> None:
    command = f"cat {TOOL} | {sys.executable} - --chat"
    with Terminal(["sh", "-c", command], world.env, world.work) as terminal:
        at_prompt(terminal)
        terminal.enter("echo one")
        assert world.taken("echo one")
        at_prompt(terminal)
        terminal.send_keys("C-d")
        assert terminal.exit_status() == 0


def test_a_program_on_standard_input_is_no_task(world: World) -> None:
    with TOOL.open() as program:
        done = subprocess.run([sys.executable, "-"], cwd=world.work, env=world.env, text=True,
                              stdin=program, capture_output=True, start_new_session=True,
                              timeout=30)
    assert (done.returncode, done.stdout) == (2, "") and "There is no task" in done.stderr


def test_a_demo_that_is_interrupted_while_its_model_speaks_leaves_no_trace(world: World) -> None:
    run = world.start("--demo", "--json")
    assert poll(lambda: "iteration_start" in run.stdout, 30)
    done = run.end(by=signal.SIGINT)
    assert done.status == 130 and re.fullmatch("Dashboard: .*\n", done.stderr), done.stderr
    assert_nothing_is_left(world)


# -- The real agents ----------------------------------------------------------------------------

@pytest.fixture
def agent_api() -> Iterator[AgentApi]:
    with AgentApi() as api:
        yield api


@pytest.fixture
def with_real_agents(world: World, agent_api: AgentApi) -> Iterator[None]:
    with real_agents(agent_api.port) as programs:
        world.env.update(PATH=f"{programs}:{world.env['PATH']}", CLAUDE_CMD="")
        yield


REAL_AGENTS = pytest.mark.parametrize("name, agent", [("claude", "Claude Code"), ("gpt", "Codex")])


@REAL_AGENTS
def test_a_run_of_five_turns_completes_on_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    messages = [
        "- first #{pane_id} #(date) $HOME `x` \"quotes\" \\ back, then SAY[alpha one];",
        "Zwei Zeilen, äöü 漢字 🎉:\n\n  indented: SAY[beta two]",
        "RUN[echo made > made.txt; echo sum $((40 + 2))] SAY[gamma three]",
        "LINES[60]",
        "x" * 5000 + " SAY[epsilon five]"]
    model = world.model(*messages[:4], f"MEMORY_SAVE: tests need no network\n{messages[4]}",
                        "All was seen.\n\nTASK_COMPLETE")
    done = world.run("--task", "see five answers", DEFAULT_MODEL=name)
    assert (done.status, done.stderr) == (0, "")
    assert agent_api.messages == messages
    assert (world.work / "made.txt").read_text() == "made\n"
    assert json.loads((world.work / "memory.json").read_text()) == ["tests need no network"]

    shown = [model.last_message(number) for number in range(6)]
    assert "see five answers" in shown[0] and f"\n\n{agent} output:\n" in shown[0]
    for answer, own in (("alpha one", 1), ("beta two", 2), ("gamma three", 3), ("epsilon five", 5)):
        lines = [[line for line in text.split("\n") if re.fullmatch(rf"\W*{answer}", line)]
                 for text in shown]
        assert [len(each) for each in lines] == [int(number == own) for number in range(6)], shown
        assert shown[own].startswith(f"{agent} output:\n")
    assert "sum 42" in shown[3]
    assert [re.findall(r"line (\d+) of 60", text) for text in shown] == [
        [], [], [], [], [str(number) for number in range(1, 61)], []]

    events = world.events()
    turn = ["iteration_start", "reply", "iteration_end"]
    assert kinds(events, "note") == ["task_info", *turn * 4, "iteration_start", "reply", "memory",
                                     "iteration_end", *turn, "complete"]
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert [e["orchestrator"] for e in events if e["type"] == "iteration_end"][:5] == messages
    assert events[0]["agent"] == agent and events[-1]["outcome"] == "complete"
    assert world.journals()[0].stat().st_mode & 0o777 == 0o600


@REAL_AGENTS
def test_a_chat_of_three_messages_with_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    messages = ["first SAY[alpha one]", "second LINES[20]", "third SAY[gamma three]"]
    done = world.run("--chat", stdin="\n".join([*messages, "/quit\n"]), DEFAULT_MODEL=name,
                     OPENROUTER_API_KEY="")
    assert (done.status, done.stderr) == (0, "")
    assert agent_api.messages == messages
    answers = [line for line in done.stdout.split("\n")
               if re.fullmatch(r"\W*(alpha one|line \d+ of 20|gamma three)", line)]
    assert [re.sub(r"^\W+", "", answer) for answer in answers] == [
        "alpha one", *(f"line {number} of 20" for number in range(1, 21)), "gamma three"]


@REAL_AGENTS
def test_a_killed_agent_goes_on_with_its_conversation_if_it_is_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    messages = ["SAY[alpha one]", "RUN[sleep 9] SAY[beta two]", "SAY[gamma three]"]
    model = world.model(*messages, "TASK_COMPLETE")
    run = world.start("--task", "survive", DEFAULT_MODEL=name)
    assert poll(lambda: messages[1] in agent_api.messages, 60), run.stdout
    os.kill(int(world.tmux("display-message", "-p", "#{pane_pid}")), signal.SIGKILL)
    assert run.end().status == 0
    assert agent_api.messages == messages
    assert "alpha one" in agent_api.conversation
    assert [event["resumed"] for event in world.events("recovery")] == [True]
    assert "remembers the conversation" in model.last_message(2)
    assert "gamma three" in model.last_message(3)


@REAL_AGENTS
def test_nothing_works_on_after_an_interrupted_run_of_the_real(
        name: str, agent: str, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    """A newer Codex works in a background server, if it may."""
    loop = "RUN[for i in 1 2 3 4 5 6; do echo >> alive; sleep 1; done] SAY[alpha one]"
    world.model(loop, "TASK_COMPLETE")
    run = world.start("--task", "x", DEFAULT_MODEL=name, TERMINATE_WHEN_QUIT="true")
    assert poll(lambda: (world.work / "alive").exists(), 60), run.stdout
    assert run.end(by=signal.SIGINT).status == 130
    size, calls = (world.work / "alive").stat().st_size, agent_api.calls
    time.sleep(3)
    assert (size, calls) == ((world.work / "alive").stat().st_size, agent_api.calls)


@REAL_AGENTS
def test_an_interrupt_ends_a_turn_and_brings_the_note_to_the_model_of_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    long = "RUN[python3 -c 'import time; time.sleep(50)'] SAY[alpha one]"
    model = world.model(long, "SAY[beta two]", "TASK_COMPLETE")
    run = world.start("--task", "x", DEFAULT_MODEL=name)
    site = run.site()
    assert poll(lambda: long in agent_api.messages, 60), run.stdout
    time.sleep(2)       # until the command runs
    started = time.monotonic()
    assert site.control("interrupt", "leave\nthat") == 204
    assert poll(lambda: len(model.requests) > 1, 30)
    assert time.monotonic() - started < 8
    assert run.end().status == 0
    assert "leave\nthat" in model.last_message(1) and "Escape was pressed" in model.last_message(1)
    assert "still working" not in model.last_message(1)
    assert "SAY[beta two]" in model.last_message(2)


@pytest.mark.parametrize("command, opening", [
    ("claude --setting-sources user --permission-mode default", "RUN[touch made] SAY[it is made]"),
    ("codex --no-alt-screen --ask-for-approval never --sandbox workspace-write", "/model")])
def test_a_question_takes_keys_and_no_text_on_the_real(
        command: str, opening: str, world: World, agent_api: AgentApi,
        with_real_agents: None) -> None:
    def reply() -> str:     # the key again if it came too early: a question is deaf at first
        shown = model.last_message()
        if "beta two" in shown:
            return "TASK_COMPLETE"
        if "takes keys" not in shown:
            return "SAY[beta two]"
        on_yes = re.search(r"is on '(1\. )?Yes", shown)
        return "KEYS: " + ("Escape" if opening == "/model" else "Enter" if on_yes else "Down Enter")

    model = world.model(opening, "prose", *[reply] * 9)
    done = world.run("--task", "answer it", CLAUDE_CMD=command)
    assert (done.status, done.stderr) == (0, "")
    assert "takes keys" in model.last_message(1) and "Nothing was typed" in model.last_message(2)
    assert agent_api.messages == [opening] * (opening != "/model") + ["SAY[beta two]"]
    assert (world.work / "made").exists() == (opening != "/model")


@REAL_AGENTS
def test_a_resumed_run_has_its_conversation_after_a_reboot_if_it_is_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None,
        asked_for: None) -> None:
    model = world.model("SAY[alpha one]", "RUN[sleep 60]", "SAY[gamma three]", "TASK_COMPLETE")
    run = world.start("--task", "survive", DEFAULT_MODEL=name)
    assert poll(lambda: "RUN[sleep 60]" in agent_api.messages, 60), run.stdout
    killing_the_server(world)
    run.end(by=signal.SIGKILL)
    done = world.run("--resume", DEFAULT_MODEL=name)
    assert (done.status, done.stderr) == (0, "") and "Task:  survive" in done.stdout
    assert agent_api.messages == ["SAY[alpha one]", "RUN[sleep 60]", "SAY[gamma three]"]
    assert "alpha one" in agent_api.conversation
    assert [event["resumed"] for event in world.events("recovery")] == [True]
    assert "remembers the conversation" in model.last_message(2)


@REAL_AGENTS
def test_long_messages_slash_commands_and_many_tool_calls_in_a_new_directory_of_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None) -> None:
    slash = {"claude": "/clear", "gpt": "/status"}[name]
    commands = " ".join(f"RUN[sleep 0.{number}; echo step {number}]" for number in range(1, 9))
    messages = ["word " * 24_000 + "SAY[alpha one]", slash, f"{commands} SAY[beta two]",
                "SAY[gamma three]"]
    model = world.model(*messages, "TASK_COMPLETE")
    done = world.run("--task", "much", DEFAULT_MODEL=name)
    assert (done.status, done.stderr) == (0, "")
    del messages[1]         # Claude Code puts a word about it in front of what comes after it
    assert [heard.endswith(said) for heard, said in zip(agent_api.messages, messages)] == [True] * 3
    assert agent_api.messages[0] == messages[0] and len(agent_api.messages) == 3
    shown = [model.last_message(number) for number in range(5)]
    for answer, own in (("alpha one", 1), ("beta two", 3), ("gamma three", 4)):
        assert [bool(re.search(rf"(?m)^\W*{answer}\s*$", text)) for text in shown] == [
            number == own for number in range(5)], shown
    answered = [note["text"] for note in world.events("note") if "answered" in note["text"]]
    assert [re.sub(".*: ", "", text) for text in answered] == [
        "Yes, I trust this folder", "Yes, I accept"] * (name == "claude")


@REAL_AGENTS
def test_a_long_command_is_one_turn_of_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None,
        asked_for: None) -> None:
    """Codex waits 30 s for a command at most, then it goes on without it."""
    seconds = {"claude": 60, "gpt": 25}[name]
    message = f"RUN[python3 -c 'import time; time.sleep({seconds})'; date > made] SAY[alpha one]"
    model = world.model(message, "TASK_COMPLETE")
    assert world.run("--task", "sleep", DEFAULT_MODEL=name).status == 0
    assert re.search(r"(?m)^\W*alpha one$", model.last_message(1))
    assert (world.work / "made").exists()


@REAL_AGENTS
def test_a_person_who_types_while_it_works_ends_no_turn_of_the_real(
        name: Any, agent: Any, world: World, agent_api: AgentApi, with_real_agents: None,
        asked_for: None) -> None:
    """What is typed takes the place of the words that tell that Claude Code works."""
    message = "RUN[python3 -c 'import time; time.sleep(9)'; date > made] SAY[alpha one]"
    model = world.model(message, "SAY[beta two]", "TASK_COMPLETE")
    run = world.start("--task", "sleep", DEFAULT_MODEL=name)
    assert poll(lambda: message in agent_api.messages, 60), run.stdout
    time.sleep(2)
    world.tmux("send-keys", "-t", "=gt-claude-loop:", "-l", "half a word")
    assert run.end().status == 0
    assert re.search(r"(?m)^\W*alpha one$", model.last_message(1))
    assert "half a word" in model.last_message(2) and agent_api.messages == [
        message, "SAY[beta two]"]


# -- Chat ---------------------------------------------------------------------------------------

def at_prompt(terminal: Terminal) -> None:
    assert poll(lambda: f"\n{terminal.screen()}".endswith("\n>"), 30), terminal.screen()


@contextlib.contextmanager
def chatting(world: World, *arguments: str) -> Iterator[Terminal]:
    """A person's terminal with a chat in it, at its first prompt."""
    command = [*arguments, sys.executable, TOOL, "--chat"]
    with Terminal(command, world.env, world.work) as terminal:
        at_prompt(terminal)
        yield terminal


def test_a_person_chats_in_a_terminal(world: World) -> None:
    with chatting(world) as terminal:
        terminal.enter("echo it's; here;")
        terminal.wait_for("\nit's; here;\n")
        terminal.wait_for("\n> echo it's; here;\n")
        terminal.send_keys("Up", "Up", "Up", "BSpace", "Enter")
        terminal.wait_for("\nit's; here\n")
        terminal.enter("/keys Nokey Enter")
        terminal.wait_for("'Nokey' is no key")
        terminal.enter("/keys e c h o Space x Enter")
        terminal.wait_for("\nx\n")
        at_prompt(terminal)
        terminal.enter("/screen")
        assert poll(lambda: terminal.screen().count("A small agent.") == 2, 15)
        at_prompt(terminal)
        for line, then in (('"""echo one', "one\n..."), ("", "...\n..."), ('  x y"""', "\none\n>")):
            terminal.enter(line)
            terminal.wait_for(then)
        assert world.taken("echo one\n\n  x y")
        terminal.enter("/exit")
        assert terminal.exit_status() == 0
        assert "waiting for" not in terminal.screen()
    assert world.log("took") == ["echo it's; here;", "echo it's; here", "echo x",
                                 "echo one\n\n  x y"]


@pytest.mark.parametrize("how", ["with brackets", "without", "without readline"])
def test_a_pasted_block_is_one_message(how: str, world: World) -> None:
    if how == "without readline":
        (world.home / "readline.py").write_text("raise ImportError\n")
        world.env["PYTHONPATH"] = str(world.home)
    block = "echo one\n\n\techo ä\n" + "".join(f"{number}: {'x' * 70}\n" for number in range(40))
    with chatting(world) as terminal:
        terminal.paste_text(block, brackets=how == "with brackets")
        if how == "with brackets":
            terminal.wait_for("39: xxx")
            assert world.log("took") == []
            terminal.send_keys("Enter")
        assert world.taken(block.rstrip()), world.log("took")
        at_prompt(terminal)
        terminal.send_keys("C-d")
        assert terminal.exit_status() == 0
    assert world.log("took") == [block.rstrip()]


def test_lines_typed_ahead_are_messages_of_their_own(world: World) -> None:
    with chatting(world) as terminal:
        for line in ("echo one && sleep 4", "echo two", "echo three"):
            terminal.enter(line)
            assert world.taken("echo one && sleep 4")
        assert world.taken("echo three")
    assert world.log("took") == ["echo one && sleep 4", "echo two", "echo three"]


def test_ctrl_c_gives_the_prompt_back_and_leaves_only_the_second_time(world: World) -> None:
    with chatting(world) as terminal:
        terminal.enter("echo begun && sleep 5 && echo over")
        terminal.wait_for(" s: begun")
        terminal.send_keys("C-c")
        screen = terminal.wait_for("/wait waits for it, /keys Escape or /keys")
        assert "waiting for" not in screen.rsplit("\n> ", 1)[-1] and not world.log("done")
        terminal.enter("/wait")
        terminal.wait_for("\nover\n")
        terminal.enter('"""echo never')
        terminal.wait_for("\n...")

        def has_advice(times: int) -> bool:
            return terminal.screen().count("/quit to leave") == times

        for presses in (1, 2):      # of a block, and of a line
            terminal.send_keys("C-c")
            assert poll(functools.partial(has_advice, presses), 15)
            at_prompt(terminal)
            terminal.type("echo never" if presses == 1 else "")
        terminal.send_keys("C-c")
        assert terminal.exit_status() == 0
        assert "Chat ended: 2 messages" in terminal.screen()
    assert world.log("took") == ["echo begun && sleep 5 && echo over"]


def test_a_password_is_typed_unseen_and_stays_out_of_the_journal(world: World) -> None:
    world.env["CLAUDE_CMD"] = "stty -echo; read word; stty echo; echo $word | tr a-z A-Z; cat"
    with Terminal([sys.executable, TOOL, "--chat"], world.env, world.work) as terminal:
        terminal.wait_for("hidden>")
        terminal.enter("p4ssword")
        assert "p4ssword" not in terminal.wait_for("P4SSWORD")
        terminal.send_keys("C-c")
        terminal.wait_for("\n>")
    journal, = world.journals()
    assert "p4ssword" not in journal.read_text() and "(hidden input)" in journal.read_text()


def test_a_run_in_a_terminal_shows_what_it_waits_for_while_it_does(world: World) -> None:
    gate = Gate()
    world.model(gate.reply("echo begun && sleep 4"), "TASK_COMPLETE")
    command = [sys.executable, TOOL, "--task", "x"]
    with Terminal(command, world.env, world.work) as terminal:
        terminal.wait_for("waiting for the model")
        gate.set()
        assert "the model" not in terminal.wait_for(" s: begun").rsplit("\n", 1)[-1]
        assert terminal.exit_status() == 0
        assert "waiting for" not in terminal.screen()


@pytest.mark.parametrize("surroundings", ["TERM=dumb", "out.jsonl"])
def test_nothing_moves_and_nothing_but_events_is_in_the_output_where_that_is_no(
        surroundings: str, world: World) -> None:
    shell = ["sh", "-c", f'exec "$@" --json > {surroundings}', "sh"]
    with chatting(world, *(["env", surroundings] if "TERM" in surroundings else shell)) as terminal:
        terminal.enter("echo begun && sleep 1 && echo over")
        assert poll(lambda: "waiting for" in terminal.screen() or world.log("done"), 20) == [
            "echo begun && sleep 1 && echo over"]
        at_prompt(terminal)
        terminal.send_keys("C-d")
        assert terminal.exit_status() == 0
    if surroundings == "out.jsonl":
        lines = (world.work / "out.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == world.events()


@pytest.mark.parametrize("arguments, mode", [(["--chat"], "true"), ([], "no")])
def test_a_chat_needs_no_key_and_ends_with_the_input(
        arguments: list[Any], mode: str, world: World) -> None:
    done = world.run(*arguments, stdin="echo one\n\necho two\n", OPENROUTER_API_KEY="",
                     AUTONOMOUS_MODE=mode)
    assert (done.status, done.stderr) == (0, "")
    assert world.log("took") == ["echo one", "echo two"]
    assert "\none\n" in done.stdout and "\ntwo\n" in done.stdout
    assert not re.search("[\x1b\r]|waiting for|^>", done.stdout, re.M)


# -- Sending ------------------------------------------------------------------------------------

CORPUS = [
    "x", "-", "-n", "--help", ";", "x;", "a\\;", "\\", "a\nb \\", "echo a && echo b \\;", "!", "#",
    "/help", "%1", "#{pane_id} #(touch sign) #[fg=red]#", "$HOME `touch sign` $(touch sign)",
    "~/'\"`\\", "'", "Enter", "C-c", "\ttab", "a\tb  \t\n\n\n  trailing blanks above   \nx", "❯",
    ">", "e\u0301 \u1112\u1161\u11ab 漢字 ｆｕｌｌ",
    "🎉 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️", "שלום \u202e عربى \u202c",
    "\u200b\u00a0\u3000\ufeff\U0010ffff",
    "{ brace } [ a ] < b > | & * ?", "\n".join(f"line {number}" for number in range(1000)),
    "\n".join("word " * 9 + "end" for _ in range(400)), "漢" * 30_000]
UNTYPABLE = [       # what of it may press a key or end the paste is left out
    ("a\x1b[201~\rtouch sign\r", "a[201~\ntouch sign"), ("a\x9b201~b\x1bOAc", "a201~bOAc"),
    ("a\r\nb\rc", "a\nb\nc"), ("\x1b]0;⠋\x07t", "]0;⠋t"),
    ("nul \0, bell \a, C-c \x03, C-d \x04, DEL \x7f, shift \x0e.",
     "nul , bell , C-c , C-d , DEL , shift ."), ("\x80\x85\x9b\x9f|", "|")]


def test_every_message_arrives_byte_for_byte_with_one_enter(new_world: Callable[[], World]) -> None:
    typed = [*CORPUS, *(text for _, text in UNTYPABLE), "q" * 1_000_000]
    said = [*CORPUS, *(text for text, _ in UNTYPABLE), typed[-1]]
    marks = {"brackets": "\x1b[200~%s\x1b[201~\r", "plain": "%s\r"}
    worlds = at_once(new_world, {
        f"{paste} {part}": [*said[part::6], {"AGENT_PASTE": paste}]
        for paste in marks for part in range(6)}, HISTORY_MAX_TOKENS="9999999")
    for name, world in worlds.items():
        paste, part = name.split()
        expected = [marks[paste].replace("%s", text) for text in typed[int(part)::6]]
        assert [(read[:99], len(read)) for read in world.log("read")] == [
            (read[:99], len(read)) for read in expected], name
        assert world.log("read") == expected and world.log("took") == typed[int(part)::6], name
        assert not (world.work / "sign").exists()


def test_an_enter_is_repeated_until_the_message_is_taken_and_the_text_is_pasted_once(
        new_world: Callable[[], World]) -> None:
    messages = ["x", "two\nrows", "chip " * 2000 + ".", "wrapped " * 60 + "."]
    cases = {"loses one": (1, messages, {"AGENT_EATS": "1"}),
             "loses two": (2, messages[:2], {"AGENT_EATS": "2"}),
             "loses three": (3, messages[:1], {"AGENT_EATS": "3"}),
             "loses one, no sign": (1, messages[:2], {"AGENT_EATS": "1", "AGENT_SIGN": "none"}),
             "slow": (0, messages, {"AGENT_SLOW": "1"}),
             "slow, loses one": (1, messages[:2], {"AGENT_SLOW": "1", "AGENT_EATS": "1"})}
    worlds = at_once(new_world, {name: [*said, "end", settings]
                                 for name, (_, said, settings) in cases.items()})
    for name, (lost, said, _) in cases.items():
        assert worlds[name].log("read") == [
            f"\x1b[200~{text}\x1b[201~\r" + "\r" * lost for text in [*said, "end"]], name


def test_an_enter_that_became_a_new_line_is_repeated(new_world: Callable[[], World]) -> None:
    """Codex takes an Enter that comes within 120 ms after a paste for a part of that."""
    messages = ["x", "two\nrows", "chip " * 2000 + ".", "end"]
    worlds = at_once(new_world, {
        "quick": [*messages, {"AGENT_DEAF": "0.12"}],
        "slow": [*messages, {"AGENT_DEAF": "0.12", "AGENT_SLOW": "1"}]}, prepare=as_claude)
    for name, world in worlds.items():
        assert world.log("took") == messages, name
        assert [re.fullmatch(r"(?s)\x1b\[200~[^\x1b]*\x1b\[201~(\r{1,2})", read) is not None
                for read in world.log("read")] == [True] * 4, name


def test_an_enter_that_was_taken_is_never_doubled(new_world: Callable[[], World]) -> None:
    """A second one would answer the question that came up, or be an empty message."""
    said = ["echo x\nask Yes", "❯", "ask ❯", ">", "end"]
    replies = [text for each in said for text in [each, "KEYS: n"][:1 + ("ask " in each)]]
    worlds = at_once(new_world, {sign: [*replies, {"AGENT_SIGN": sign}]
                                 for sign in ("title", "footer", "none")})
    for sign, world in worlds.items():
        assert world.log("answered") == ["n"] * 2, sign
        assert world.log("read") == [f"\x1b[200~{text}\x1b[201~\r" for text in said], sign


def test_a_message_is_delivered_whatever_the_pane_is_in(world: World) -> None:
    pane = "=gt-claude-loop:"

    def first(*words: str) -> Callable[[], str]:
        return lambda: world.tmux(*words) or f"echo after {words[0]}"

    def scrolled() -> str:
        person.send_keys("C-b", "[", "PageUp", "PageUp")
        assert poll(lambda: world.tmux("display-message", "-p", "#{pane_in_mode}") == "1", 10)
        return "echo to a person who scrolls"

    model = world.model(
        "lines 200", first("copy-mode", "-t", pane), first("choose-tree", "-t", pane),
        "write \\x1b[?1049h\\x1b[2J\\x1b[Hfull screen\\n", "echo inside", "write \\x1b[?1049l",
        scrolled, "sleep 2 && lines 30", "TASK_COMPLETE")
    with contextlib.ExitStack() as stack:
        run = world.start("--task", "x")
        assert poll(lambda: world.log("took"), 30), run.stdout
        person = stack.enter_context(Terminal(
            ["tmux", "-L", "gt-claude-loop", "attach", "-t", pane], world.env, world.work))
        person.wait_for("line 200 of 200")
        assert poll(lambda: "sleep 2 && lines 30" in world.log("took"), 60), run.stdout
        person.send_keys("C-b", "[", "PageUp", "PageUp")
        done = run.end()
    assert (done.status, done.stderr) == (0, "")
    assert world.log("read") == [f"\x1b[200~{text}\x1b[201~\r" for text in world.log("took")]
    assert [message.split()[-1] for message in world.log("took")] == [
        "200", "copy-mode", "choose-tree", "screen\\n", "inside", "\\x1b[?1049l", "scrolls", "30"]
    shown = [model.last_message(number) for number in range(9)]
    assert "\nafter copy-mode" in shown[2] and "\nafter choose-tree" in shown[3]
    assert "\nto a person who scrolls" in shown[7] and "\nline 30 of 30" in shown[8]
    assert ["visible screen" in text for text in shown] == [
        number == 4 for number in range(9)], shown


def test_the_task_may_come_from_standard_input(world: World) -> None:
    model = world.model("TASK_COMPLETE")
    assert world.run(stdin="count\nthe stars\n").status == 0
    assert "count\nthe stars" in model.last_message()
    assert world.events()[0]["task"] == "count\nthe stars"


# -- Recovery -----------------------------------------------------------------------------------

def killing_the_agent(world: World) -> None:
    os.kill(world.log("pid")[-1], signal.SIGKILL)


def killing_the_session(world: World) -> None:
    world.tmux("new-session", "-d", "-s", "another", "sleep", "1000")
    world.tmux("kill-session", "-t", "=gt-claude-loop")


def killing_the_server(world: World) -> None:
    os.kill(int(world.tmux("display-message", "-p", "#{pid}")), signal.SIGKILL)


def closing_the_agents_pane(world: World) -> None:
    agents_pane = world.tmux("display-message", "-p", "#{pane_id}")
    world.tmux("split-window", "sleep", "1000")     # of a person, which stays
    world.tmux("kill-pane", "-t", agents_pane)


ACCIDENTS = pytest.mark.parametrize("accident", [
    killing_the_agent, killing_the_session, killing_the_server, closing_the_agents_pane])


@ACCIDENTS
def test_a_run_goes_on_after(accident: Any, world: World) -> None:
    model = world.model("echo one", "sleep 60 && echo two", "echo three", "TASK_COMPLETE")
    run = world.start("--task", "survive")
    assert world.taken("sleep 60 && echo two"), run.stdout
    accident(world)
    done = run.end()
    assert (done.status, done.stderr) == (0, "")
    assert world.log("took") == ["echo one", "sleep 60 && echo two", "echo three"]
    assert len(set(world.log("pid"))) == 2
    assert "started again" in model.last_message(2) and "three" in model.last_message(3)
    recovery, = world.events("recovery")
    assert (recovery["iteration"], recovery["resumed"]) == (2, False)
    assert "started again" in done.stdout


@ACCIDENTS
def test_a_chat_goes_on_after(accident: Any, world: World) -> None:
    run = world.start("--chat", stdin="echo one\nsleep 60\necho three\n/quit\n")
    assert world.taken("sleep 60"), run.stdout
    accident(world)
    done = run.end()
    assert (done.status, done.stderr) == (0, "")
    assert world.log("took") == ["echo one", "sleep 60", "echo three"]
    assert "\nthree\n" in done.stdout and "started again" in done.stdout
    assert len(world.events("recovery")) == 1


@ACCIDENTS
def test_a_message_that_was_not_taken_yet_is_said_to_the_new_agent_after(
        accident: Any, world: World) -> None:
    gate = Gate()
    model = world.model("echo one", gate.reply("echo two"), "TASK_COMPLETE")
    run = world.start("--task", "survive")
    assert poll(lambda: len(model.requests) == 2, 30), run.stdout
    accident(world)
    gate.set()
    assert run.end().status == 0
    assert world.log("took") == ["echo one", "echo two"]
    assert "started again" in model.last_message() and "\ntwo\n" in model.last_message() + "\n"


def test_a_socket_that_something_removed_is_made_again_and_the_agent_works_on(world: World) -> None:
    world.model("sleep 2 && echo one", "echo two", "TASK_COMPLETE")
    run = world.start("--task", "survive")
    assert world.taken("sleep 2 && echo one"), run.stdout
    socket_path, = world.directory.glob("tmux-*/gt-claude-loop")
    socket_path.unlink()
    done = run.end()
    assert (done.status, done.stderr) == (0, "")
    assert len(set(world.log("pid"))) == 1 and not world.events("recovery")


def test_a_login_that_has_expired_ends_the_run_with_what_to_do(world: World) -> None:
    model = world.model(*["echo ⎿ Not logged in · Please run /login"] * 9)
    done = world.run("--task", "x", **as_claude(world))
    assert done.status == 5 and len(model.requests) == 1
    assert_one_complaint(done, "Not logged in", "log in with /login")
    assert world.events()[-1]["outcome"] == "agent"


def test_a_command_of_one_word_runs_where_the_shell_of_the_user_refuses_to(world: World) -> None:
    world.model("echo one", "TASK_COMPLETE")
    path = world.program("mine", f"exec {world.env['CLAUDE_CMD']}")
    refusing = str(shutil.which("false"))
    assert world.run("--task", "x", PATH=path, CLAUDE_CMD="mine", SHELL=refusing).status == 0
    assert world.log("took") == ["echo one"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a daemon's origin can't be read")
def test_what_the_agent_has_started_ends_with_the_run_wherever_it_went(world: World) -> None:
    daemon = "(setsid sh -c 'trap \"\" HUP; while :; do echo >> alive; sleep 0.1; done' &)"
    world.model(daemon, "TASK_COMPLETE")
    done = world.run("--task", "x", CLAUDE_CMD="bash --norc", TERMINATE_WHEN_QUIT="true")
    assert (done.status, done.stderr) == (0, "")
    size = (world.work / "alive").stat().st_size
    time.sleep(0.5)
    assert size == (world.work / "alive").stat().st_size > 0
    assert not processes_of(world.directory)


def test_an_agent_that_ends_by_itself_is_started_again_and_its_last_words_are_told(
        world: World) -> None:
    model = world.model("echo goodbye && die 7", "echo back", "TASK_COMPLETE")
    assert world.run("--task", "survive").status == 0
    assert "goodbye" in model.last_message(1) and "status 7" in model.last_message(1)
    assert world.log("took") == ["echo goodbye && die 7", "echo back"]


def test_an_agent_that_ends_again_and_again_ends_the_run(world: World) -> None:
    world.model(*["die 7"] * 9)
    done = world.run("--task", "survive")
    assert done.status == 5
    assert_one_complaint(done, "restarted 3 times", "status 7")
    assert world.log("took") == ["die 7"] * 4
    assert world.events()[-1]["outcome"] == "agent"


@pytest.mark.parametrize("moment", ["the agent works", "the model thinks"])
def test_a_run_is_resumed_after_a_kill_while(moment: str, world: World) -> None:
    gate = Gate()
    second = "sleep 3 && echo two" if moment == "the agent works" else gate.reply("echo two")
    model = world.model("MEMORY_SAVE: kills happen\necho one", second, "echo three",
                        "TASK_COMPLETE")
    run = world.start("--task", "survive")
    busy = {"the agent works": lambda: "sleep 3 && echo two" in world.log("took"),
            "the model thinks": lambda: len(model.requests) == 2}
    assert poll(busy[moment], 30), run.stdout
    run.end(by=signal.SIGKILL)
    done = world.run("--resume")
    gate.set()
    assert (done.status, done.stderr) == (0, "")
    two = ["sleep 3 && echo two"] * (moment == "the agent works")
    assert world.log("took") == ["echo one", *two, "echo three"]
    heard = json.dumps(model.requests[2].body["messages"])
    assert "survive" in heard and "echo one" in heard and "You were stopped" in heard
    assert "three" in model.last_message()
    assert json.loads((world.work / "memory.json").read_text()) == ["kills happen"]
    journal, = world.journals()
    events = world.events()
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["task"] == "survive" and events[-1]["outcome"] == "complete"


def test_who_may_resume_a_run_and_with_which_settings(world: World) -> None:
    gate = Gate()
    model = world.model("sleep 2 && echo one", gate.reply("lost reply"), "echo two", "echo three",
                        "TASK_COMPLETE")
    run = world.start("--task", "survive", MAX_ITERATIONS="2")
    site = run.site()
    assert poll(lambda: len(model.requests) == 2, 30), run.stdout
    assert_refused(world.run("--resume"), 2, "Another orchestrator", str(run.process.pid))
    assert site.control("note", "mind the gap") == 204 and site.control("pause") == 204
    run.end(by=signal.SIGKILL)
    gate.set()
    assert_refused(world.run("--resume", CLAUDE_TMUX_SESSION="b"), 2, "another session", "attach")
    assert_refused(world.run("--resume", CLAUDE_CMD="cat"), 2, "CLAUDE_TMUX_SESSION", "agent.py")
    done = world.run("--resume", AUTONOMOUS_MODE="no", MAX_ITERATIONS="2")
    assert done.status == 3 and done.stdout.startswith("Task:  survive\n")
    assert_one_complaint(done, "MAX_ITERATIONS=2")
    assert "mind the gap" in model.last_message(2)
    assert "lost reply" not in str(model.requests[2].body)
    assert world.run("--resume", MAX_ITERATIONS="4").status == 0
    assert world.log("took") == ["sleep 2 && echo one", "echo two", "echo three"]
    assert [event["iteration"] for event in world.events("reply")] == [1, 2, 3, 4]
    used = [event["iterations"] for event in world.events("complete")]
    assert used == [2, 4] and world.events()[-1]["cost"] == 4 * model.COST
    assert_refused(world.run("--resume"), 2, "has ended (complete)", world.journals()[0].name)


def test_what_the_agent_does_while_nobody_looks_is_shown_after_the_run_is_resumed(
        world: World) -> None:
    model = world.model("sleep 3 && echo two", "echo three", "TASK_COMPLETE")
    run = world.start("--task", "survive")
    assert world.taken("sleep 3 && echo two"), run.stdout
    run.end(by=signal.SIGKILL)
    assert world.run("--resume").status == 0
    shown = "\n".join(model.last_message(number) for number in (1, 2))
    assert "\ntwo\n" in shown and "\nthree\n" in shown + "\n"


def killed(run: Run, world: World) -> int:
    run.process.kill()
    return -signal.SIGKILL


def killed_with_its_server(run: Run, world: World) -> int:
    faults: list[Callable[[], object]] = [run.process.kill, lambda: killing_the_server(world)]
    first, second = random.sample(faults, 2)
    with contextlib.suppress(ValueError):       # there is no server yet
        first()
        second()
    run.process.kill()
    return -signal.SIGKILL


def terminated(run: Run, world: World) -> int:
    run.process.terminate()
    return 128 + signal.SIGTERM


def interrupted(run: Run, world: World) -> int:
    run.process.send_signal(signal.SIGINT)
    return 128 + signal.SIGINT


FAULTS = [killed, killed_with_its_server, terminated, interrupted]
Counts = dict[str, int]


def end_again_and_again(fault: Callable[[Run, World], int], things: int = 6) -> Counts:
    """End a run at random moments and resume it until it completes; check what is left of it.

    Each thing was done once, all facts are there, and the journal is whole.
    """
    with contextlib.ExitStack() as stack:
        world = World(stack.enter_context(scratch_directory()), stack)
        model = stack.enter_context(Overseer(things))
        settings: dict[str, Any] = {
            "OPENROUTER_BASE_URL": model.url, "HISTORY_MAX_TOKENS": "1100",
            "MEMORY_MAX_FACTS": "4", "VERIFY_CMD": "sleep 0.3",
            "TERMINATE_WHEN_QUIT": random.choice(["true", "false"])}
        ends = 0
        while True:
            before = len(world.events())
            run = world.start(*["--resume"] if before else ["--task", "do it"], **settings)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(random.uniform(0.2, 5))
            alive = run.process.poll() is None
            expected, done = fault(run, world) if alive else 0, run.end()
            ends += alive
            if [event["outcome"] for event in world.events()[-1:] if "outcome" in event] == [
                    "complete"]:
                break
            if len(world.events()) > before:        # else it had no time to begin
                assert done.status == expected and "Traceback" not in done.stderr, done
                assert fault in FAULTS[:2] or kinds(world.events())[-1] == "complete"
        did = (world.work / "did").read_text().split()
        facts = json.loads((world.work / "memory.json").read_text())
        assert did == [str(number) for number in range(1, things + 1)], (did, world.events())
        assert facts == [f"fact {number}" for number in range(1, things + 1)], facts
        journal, = (path for path in world.journals() if path.stat().st_size)
        whole = [event for event in map(parsed, journal.read_bytes().split(b"\n")) if event]
        assert [event["id"] for event in whole] == list(range(1, len(whole) + 1))
        assert (whole[0]["type"], whole[-1]["outcome"]) == ("task_info", "complete")
        assert list(world.work.glob(".memory*")) == []
        found = kinds(whole)
        return {"runs": 1, "ends": ends, "events": len(whole), "questions": sum(
            event.get("text") == "recall" for event in whole), **{
                kind: found.count(kind) for kind in ("recovery", "history", "verify")}}


def parsed(line: bytes) -> Event | None:
    """Return the event of a line, None if it is torn."""
    with contextlib.suppress(ValueError):
        event: Event = json.loads(line)
        return event
    return None


def test_nothing_is_lost_or_done_twice_however_often_a_run_is_ended() -> None:
    """A hundred runs for each way to end them with BENCHMARK=1, eight at once."""
    many, things = (100, 6) if os.environ.get("BENCHMARK") else (1, 3)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = {fault: pool.map(end_again_and_again, [fault] * many, [things] * many)
                   for fault in FAULTS}
    for fault, each_run in results.items():
        counts = list(each_run)
        print(f"\n{fault.__name__}:", {name: sum(each[name] for each in counts)
                                        for name in counts[0]})
# -- The end of a turn --------------------------------------------------------------------------

def pauses(agent: str, seconds: Sequence[float]) -> list[str]:
    """Return messages that have an agent pause so often, and at the end say which it was."""
    sleep = "sleep %.2f && echo mid && sleep %.2f && echo end-%d"
    if agent == "bash":
        sleep = "sleep %.2f; echo mid; sleep %.2f; echo end-$((%d))"
    return [sleep % (*pair, number) for number, pair in enumerate(zip(seconds, seconds[1:]))]


def agent_like(kind: str) -> dict[str, str]:
    """Return the settings for an agent with a sign, or for a shell."""
    return {"CLAUDE_CMD": "bash --norc"} if kind == "bash" else {"AGENT_SIGN": kind}


def early(world: World, messages: Sequence[Any]) -> list[str]:
    """Return the messages of a run whose turn was over before the agent had said so."""
    ends = [re.sub(r".*(end-).*?(\d+)\D*", r"\1\2", message) for message in messages]
    turns = [turn["agent_output"] for turn in world.events("iteration_end")]
    return [message for message, end, turn in zip(messages, ends, turns)
            if not re.search(f"(?m)^{end}$", turn)]


def as_claude_if_still(world: World, name: str) -> dict[str, str]:
    """Have the small agent run as Claude Code if only words of that say that it works."""
    return as_claude(world) if name.startswith("still") else {}


def test_a_turn_is_over_when_the_agent_is_done_and_not_before(
        new_world: Callable[[], World]) -> None:
    """Whether its sign lives, or stands still for a while; and in spite of signs left behind."""
    cases = {kind: [*pauses(kind, [0, 0.1, 0.5, 2.5, 4, 1]), agent_like(kind)]
             for kind in ("title", "footer", "bash")}
    frozen = ["freeze 10 && echo end-1", "sleep 0.2 && echo end-2"]
    cases |= {f"{kind}, frozen": [*frozen, agent_like(kind)] for kind in ("title", "footer")}
    quoted = r"write ✻ Thinking… (12s • esc to interrupt)\n\n  esc to interrupt\n\n"
    cases |= {f"{kind}, quoted": [f"{quoted} && echo end-1", agent_like(kind)]
              for kind in ("title", "footer", "none")}
    leave = "printf '\\033]0;\u2839 working\\007'; echo end-$((%d))"
    cases["bash, left behind"] = [leave % 1, agent_like("bash")]
    cases["title, at once"] = ["echo end-1", "echo end-2", {"AGENT_THINKS": "0"}]
    cases["still"] = ["sleep 17 && echo end-1", "echo end-2", agent_like("still")]
    worlds = at_once(new_world, cases, prepare=as_claude_if_still)
    assert {name: early(worlds[name], case[:-1]) for name, case in cases.items()} == {
        name: [] for name in cases}
    for name, world in worlds.items():
        assert "still working" not in world.everything(), name


def test_benchmark_of_200_turns_with_pauses(
        new_world: Callable[[], World], asked_for: None) -> None:
    cases = {}
    for number, kind in enumerate(("title", "footer", "bash") * 2 + ("still",) * 3):
        draw = random.Random(number)
        seconds = [draw.uniform(0, 10) for _ in range(24)]
        cases[f"{kind} {number}"] = [*pauses(kind, seconds), agent_like(kind)]
    worlds = at_once(new_world, cases, limit=900, prepare=as_claude_if_still)
    over = {name: early(worlds[name], case[:-1]) for name, case in cases.items()}
    print(f"\n{sum(len(case) - 1 for case in cases.values())} turns with two pauses of 0 to 10 s: "
          f"{sum(map(len, over.values()))} ended early")
    assert not any(over.values()), over


# -- What is new --------------------------------------------------------------------------------

VISIBLE = "[This is the whole visible screen. The new part could not be identified.]\n"
REDRAWN = r"write \x1b[2J\x1b[3J\x1b[HA small agent.\n\n❯ lines 2\nline 1 of 2\nline 2 of 2\n"
SIXTY = "\n".join(map(str, range(1, 61)))


NEWS: list[tuple[str, list[tuple[str, str | None]]]] = [
    ("title", [("echo same", "same"), ("echo same", "same"), ("echo same && echo", "same")]),
    ("bash", [("seq 60", SIXTY), ("clear; echo after", VISIBLE + "after\n$"), ("seq 60", SIXTY),
              (r"printf '\033[2J\033[Hafter\n'", "after"),
              (r"printf '\033[2J\033[3J\033[H'; seq 2", VISIBLE + "1\n2\n$"), ("seq 60", SIXTY)]),
    ("bash", [("seq 60", SIXTY), ("reset; echo after", "after"), ("echo x", "x")]),
    ("bash", [("seq 60", SIXTY), (r"printf '\033[?1049h'; echo in; printf '\033[?1049l'", ""),
              (r"printf '\033[?1049h\033[2J\033[Hin\n'", VISIBLE + "in\n$"),
              (r"echo still", "still"), (r"tput rmcup", None),
              ("echo x", "x")]),
    ("title", [("lines 2", "line 1 of 2\nline 2 of 2"), (REDRAWN + r"❯ again\nnew\n", "new"),
               (REDRAWN + r"❯ again\nnew\n❯ third\nnew\n", "new"), ("echo x", "x")]),
    ("title", [(f"echo {text}", text) for text in (
        "w" * 300, "漢" * 150, "a" + "漢" * 150, "e\u0301" * 300, "x" * 198 + "👍🏽" * 4)]),
    ("title", [("lines 30000", None), ("lines 30000", None), ("echo small", "small")]),
    ("title", [("lines 99999", VISIBLE + "\n".join(
        f"line {number} of 99999" for number in range(99952 - 1, 100_000)) + "\n❯"),
        ("echo same", "same"), ("echo same", "same")])]


def test_what_is_new_is_told_exactly(new_world: Callable[[], World]) -> None:
    cases = {f"{number} {kind}": [*(message for message, _ in turns), agent_like(kind)]
             for number, (kind, turns) in enumerate(NEWS)}
    worlds = at_once(new_world, cases, PS1="$ ")
    for world, (kind, turns) in zip(worlds.values(), NEWS):
        shown = [turn["agent_output"] for turn in world.events("iteration_end")]
        for (message, new), text in zip(turns, shown):
            first = "$ " if kind == "bash" else "❯ "
            first += "again" if "❯ again" in message else message
            whole = new if not new or new.startswith(VISIBLE) else f"{first}\n{new}"
            assert text in (whole or first, f"❯ third\n{new}") or new is None, (message, text)


def test_what_is_new_is_told_exactly_when_the_window_was_resized_in_mid_turn(
        new_world: Callable[[], World]) -> None:
    order = "sleep 1.5 && lines 100 && echo end"
    worlds = {size: new_world() for size in ((120, 30), (260, 70))}
    runs = []
    for world in worlds.values():
        world.model(f"lines 90 && echo {'w' * 180}", order, "echo x", "TASK_COMPLETE")
        runs.append(world.start("--task", "x"))
    for (width, height), world in worlds.items():
        assert world.taken(order)
        world.tmux("resize-window", "-t", "=gt-claude-loop:", "-x", str(width), "-y", str(height))
    assert [run.end().status for run in runs] == [0, 0]
    hundred = "\n".join(f"line {number} of 100" for number in range(1, 101))
    for world in worlds.values():
        assert [turn["agent_output"] for turn in world.events("iteration_end")][1:3] == [
            f"❯ {order}\n{hundred}\nend", "❯ echo x\nx"]


def test_two_hundred_thousand_lines_are_taken_in_little_memory_and_their_loss_is_told(
        world: World) -> None:
    gate = Gate()
    model = world.model("seq 1 200000", "echo small", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x", CLAUDE_CMD="bash --norc")
    assert poll(lambda: len(model.requests) == 3, 60), run.stdout
    peak = found(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{run.process.pid}/status").read_text())
    assert int(peak[1]) < 100_000 and processor_seconds(run.process.pid) < 10
    gate.set()
    assert run.end().status == 0
    assert "visible screen" in model.last_message(1) and "\n200000\n" in model.last_message(1)
    assert "\nsmall" in model.last_message(2) and "99\n" not in model.last_message(2)


# -- The start ----------------------------------------------------------------------------------

TRUST = "choose Quick safety check: do you trust this folder?"
BYPASS = "choose WARNING: Claude Code running in Bypass Permissions mode"
UNKNOWN = "choose Which theme?"
STARTS = {      # what a slow Claude Code does before it is ready, and what is chosen
    "slow": ("sleep 10", []), "slow after a word": ("echo Loading…&&sleep 3&&echo Welcome!", []),
    "older": (f"{TRUST}/*1. Yes, I trust this folder/2. No, exit&&{BYPASS}/*1. No, exit/"
              "2. Yes, I accept", ["1. Yes, I trust this folder", "2. Yes, I accept"]),
    "newest": (f"{TRUST}/*No, exit/Yes, I trust this folder&&sleep 1&&{BYPASS}/*No, exit/"
               "Yes, I accept", ["Yes, I trust this folder", "Yes, I accept"]),
    "upside down": (f"{BYPASS}/Yes, I accept/*No, exit&&{TRUST}/Yes, I trust this folder/*No, exit",
                    ["Yes, I accept", "Yes, I trust this folder"])}


def test_a_start_is_waited_for_and_known_questions_are_answered_by_their_label(
        new_world: Callable[[], World]) -> None:
    cases = {name: ["echo one", {"AGENT_START": start}] for name, (start, _) in STARTS.items()}
    cases["unknown"] = ["KEYS: Down Enter", "echo one", {"AGENT_START": f"{UNKNOWN}/*Dark/Light"}]
    worlds = at_once(new_world, cases, prepare=as_claude)
    for name, world in worlds.items():
        chosen = STARTS[name][1] if name in STARTS else ["Light"]
        assert world.log("chose") == chosen, name
        assert world.log("early") == [""] and world.log("took") == ["echo one"], name
        said = [note["text"] for note in world.events("note") if "answered" in note["text"]]
        assert [re.sub(r"^.*(Yes.*)$", r"\1", text) for text in said] == [
            re.sub(r"^\d. ", "", text) for text in chosen if text != "Light"], name
    first = worlds["unknown"].said.last_message(0)
    assert "Which theme?" in first and "❯ Dark" in first


def test_an_agent_that_ends_at_once_always_leaves_its_last_words(
        world: World, asked_for: None) -> None:
    world.model("echo never")
    for command in ("echo 'license expired'; exit 3", "echo 'license expired' >&2; sleep 0.01; "
                    "exit 3", "printf 'license expired'; sleep 0.1; exit 3") * 10:
        done = world.run("--task", "x", CLAUDE_CMD=command)
        assert done.status == 5
        assert_one_complaint(done, "license expired", "status 3")


# -- Accidents at any moment --------------------------------------------------------------------

TRAP = r"""
server() { "$real" -L gt-claude-loop display-message -p '#{pid}' | tee "$here/pid"; }
kill_server() { kill -9 $(server); sleep 0.3; }
unanswered() { "$real" "$@" > /dev/null; sleep 0.5; }
lost() { echo 'server exited unexpectedly' >&2; exit 1; }
case "$*" in *%s*) echo >> "$here/calls"
    case "$(($(wc -l < "$here/calls")))" in %s) touch "$here/fired"; %s ;; esac ;;
esac
exec "$real" "$@"
"""


def with_trap(world: World, pattern: str, numbers: str, action: str) -> dict[str, str]:
    """Have something happen when the tool calls tmux like this, for the nth time or times."""
    script = f"real={shutil.which('tmux')} here={world.directory}" + TRAP % (
        pattern, numbers, action)
    return {"PATH": world.program("tmux", script)}


PASTE, ENTER, LOOK = "paste-buffer", "'Enter'", "capture-pane"
TRAPS = {
    "killed before the paste": (PASTE, "2", "kill_server"),
    "killed in the paste": (PASTE, "2", '"$real" "$@" > /dev/null; kill_server; lost'),
    "killed before the Enter": (ENTER, "2", "kill_server"),
    "killed in the Enter": (ENTER, "2", 'unanswered "$@"; kill_server; lost'),
    "killed after the Enter": (ENTER, "2", 'unanswered "$@"; kill_server; echo TAKEN; exit'),
    "killed in a look": (LOOK, "30", "kill_server"),
    "stopped for 3 s": (LOOK, "30", "kill -STOP $(server); "
                        "(sleep 3; kill -CONT $(cat \"$here/pid\")) > /dev/null 2>&1 &"),
    "paste hangs for 3 s": (PASTE, "2", "sleep 3"), "Enter hangs for 3 s": (ENTER, "2", "sleep 3"),
    "look hangs for 3 s": (LOOK, "30", "sleep 3"), "look never ends": (LOOK, "30", "exec sleep 99"),
    "paste never made": (PASTE, "2", "exec sleep 99"),
    "paste never ends": (PASTE, "2", 'unanswered "$@"; exec sleep 99'),
    "Enter never made": (ENTER, "2", "exec sleep 99"),
    "Enter never ends": (ENTER, "2", 'unanswered "$@"; exec sleep 99')}


def test_a_message_is_delivered_once_whatever_becomes_of_tmux(
        new_world: Callable[[], World]) -> None:
    messages = ["echo one", "sleep 1 && echo two", "echo three"]
    worlds = at_once(new_world, dict.fromkeys(TRAPS, messages),
                     prepare=lambda world, name: with_trap(world, *TRAPS[name]))
    took = {name: world.log("took") for name, world in worlds.items()}
    assert took == dict.fromkeys(TRAPS, messages)
    for name, world in worlds.items():
        told = "".join(world.said.last_message(number) for number in (1, 2, 3))
        assert ("started again" in told) == name.startswith("killed"), (name, told)
        assert "\nthree" in told and (world.directory / "fired").exists(), (name, told)


def test_a_tmux_that_never_answers_again_ends_the_run(world: World, asked_for: None) -> None:
    world.model("sleep 60")
    run = world.start("--task", "x")
    assert world.taken("sleep 60"), run.stdout
    server = int(world.tmux("display-message", "-p", "#{pid}"))
    os.kill(server, signal.SIGSTOP)
    try:
        done = run.end(90)
    finally:
        os.kill(server, signal.SIGCONT)
    assert done.status == 5
    assert_one_complaint(done, "no answer", "stopped")


def test_a_run_ends_in_order_when_its_directory_is_gone_and_the_agent_too(world: World) -> None:
    gone = world.directory / "gone"
    gone.mkdir()
    model = world.model('rm -r "$PWD"', "echo still here", "exit 3")
    done = world.run("--task", "x", cwd=gone, CLAUDE_CMD="bash --norc")
    assert done.status == 5
    assert_one_complaint(done, "working directory is gone", str(gone))
    assert "\nstill here" in model.last_message(2)


def test_claude_code_starts_afresh_where_there_is_nothing_to_continue(world: World) -> None:
    agent = world.env["CLAUDE_CMD"]
    script = ('case "$*" in *--continue*) echo No conversation found to continue; exit 1;; esac\n'
              f"exec {agent}")
    model = world.model("echo one", "echo two && die 9", "echo three", "TASK_COMPLETE")
    done = world.run("--task", "x", CLAUDE_CMD="", PATH=world.program("claude", script))
    assert (done.status, done.stderr) == (0, "")
    assert world.log("took") == ["echo one", "echo two && die 9", "echo three"]
    assert [event["resumed"] for event in world.events("recovery")] == [False]
    assert "has no memory" in model.last_message(2) and "two" in model.last_message(2)


# -- Sharing ------------------------------------------------------------------------------------

def test_a_person_may_attach_and_type_between_two_turns(world: World) -> None:
    def beside() -> str:
        with Terminal(["tmux", "-L", "gt-claude-loop", "attach"], world.env, world.work) as person:
            person.wait_for("one")
            person.type("echo typed by a person")
            person.send_keys("Enter")
            person.wait_for("\ntyped by a person")
            person.send_keys("C-b", "d")
            person.exit_status()
        return "echo two"

    model = world.model("echo one", beside, "echo three", "TASK_COMPLETE")
    assert world.run("--task", "x").status == 0
    assert world.log("took") == ["echo one", "echo typed by a person", "echo two", "echo three"]
    assert "\ntyped by a person\n❯ echo two\ntwo" in model.last_message(2)
    assert model.last_message(3).endswith("\nthree")


def test_a_session_that_was_made_for_another_command_is_not_typed_into(world: World) -> None:
    world.model("echo mine", "TASK_COMPLETE")
    assert world.run("--task", "x").status == 0
    for command in ("bash --norc", ""):
        done = world.run("--task", "x", CLAUDE_TMUX_SESSION="gt-claude-loop",
                         **{**as_claude(world), "CLAUDE_CMD": command})
        assert done.status == 2
        assert_one_complaint(done, "agent.py", str(world.work), "CLAUDE_TMUX_SESSION")
    assert world.log("took") == ["echo mine"]


def test_a_window_that_a_person_opened_in_the_session_is_not_typed_into(world: World) -> None:
    for word in ("one", "two"):
        world.model(f"echo {word}", "TASK_COMPLETE")
        assert world.run("--task", "x").status == 0
        world.tmux("new-window", "-t", "=gt-claude-loop:", "cat")
    assert world.log("took") == ["echo one", "echo two"]
    assert "echo" not in world.tmux("capture-pane", "-p", "-t", "=gt-claude-loop:1")


def test_a_tmux_server_that_somebody_else_started_keeps_its_options_sessions_and_secrets(
        world: World) -> None:
    world.tmux("new-session", "-d", "-s", "gt-claude-loop-2", "cat")
    world.tmux("set-environment", "-g", "OPENROUTER_API_KEY", "sk-or-of-its-shell")
    options = world.tmux("show-options", "-g"), world.tmux("show-options", "-s")
    world.model("env", "exit", "env", "TASK_COMPLETE")
    done = world.run("--task", "x", CLAUDE_CMD="bash --norc", TERMINATE_WHEN_QUIT="true")
    assert done.status == 0 and "it was started again" in done.stdout
    assert len(re.findall(r"(?m)^ +HOME=", done.stdout)) == 2
    assert "OPENROUTER_API_KEY" not in done.stdout
    assert (world.tmux("show-options", "-g"), world.tmux("show-options", "-s")) == options
    assert world.tmux("list-sessions", "-F", "#{session_name}") == "gt-claude-loop-2"
    assert world.tmux("capture-pane", "-p") == ""


def test_a_session_that_took_the_place_of_ours_is_neither_typed_into_nor_ended(
        world: World) -> None:
    def replaced() -> str:
        world.tmux("kill-server")
        assert poll(lambda: world.tmux("new-session", "-d", "-P", "-s", "gt-claude-loop", "cat"), 9)
        return "echo two"

    world.model("echo one", replaced)
    done = world.run("--task", "x", TERMINATE_WHEN_QUIT="true")
    assert done.status == 2
    assert_one_complaint(done, "gt-claude-loop", "CLAUDE_TMUX_SESSION")
    assert world.tmux("list-panes", "-a", "-F", "#{pane_current_command}") == "cat"
    assert "echo" not in world.tmux("capture-pane", "-p")


def test_a_run_that_ends_takes_no_socket_from_the_server_of_one_that_begins(world: World) -> None:
    """The other one's tmux is as quick as can be."""
    tmux = f"{shutil.which('tmux')} -L gt-claude-loop -f {os.devnull}"
    both = world.program("tmux", f"""\
case $* in *kill-session*) {tmux} kill-session
    until {tmux} new-session -d -s other; do :; done 2> {world.directory}/retries;;
*) exec {shutil.which('tmux')} "$@";; esac""")
    world.model("TASK_COMPLETE")
    assert world.run("--task", "x", TERMINATE_WHEN_QUIT="true", PATH=both).status == 0
    assert world.tmux("list-sessions", "-F", "#{session_name}") == "other"


# -- Secrets ------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["environment", ".env"])
def test_the_key_reaches_the_model_and_nothing_else_from(source: str, world: World) -> None:
    arguments: list[bytes] = []

    def last() -> str:
        assert poll(lambda: "/?token=" in str(processes_of(world.directory)), 30), "no browser"
        arguments.extend(processes_of(world.directory).values())
        return "TASK_COMPLETE"

    model = world.model("printenv | sort", last)
    look = ("import sys, urllib.request as web; url = sys.argv[1]; page = web.urlopen(url); "
            "cookie = page.headers['Set-Cookie'].split(';')[0]; web.urlopen(web.Request("
            "url.split('?')[0] + 'events', headers={'Cookie': cookie})).read()")
    browser = f'printenv > ../browser; exec {sys.executable} -c "{look}" "$1"'
    settings = {"CLAUDE_CMD": "bash --norc", "VERIFY_CMD": "printenv > ../check",
                "PATH": world.program("browser", browser),
                "DASHBOARD_OPEN": "yes", "DISPLAY": ":0", "BROWSER": "browser"}
    if source == ".env":
        (world.work / ".env").write_text(f"export OPENROUTER_API_KEY='{KEY}' # mine\n")
        settings["OPENROUTER_API_KEY"] = ""
    assert world.run("--task", "look around", **settings).status == 0
    assert model.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert f"HOME={world.home}" in model.last_message()
    assert "OPENROUTER_API_KEY" not in model.last_message()
    seen = [world.everything(), world.tmux("show-environment", "-g"),
            json.dumps([request.body for request in model.requests]), str(arguments)]
    seen += [(world.directory / name).read_text() for name in ("browser", "check")]
    assert [KEY in text for text in seen] == [False] * 6 and "orchestrator.py" in seen[3]
    (address,) = world.directory.glob("state/orchestrator/runs/*.dashboard")
    token = json.loads(address.read_text())["token"]
    seen[0] = world.journals()[0].read_text()
    assert [token in text for text in seen] == [False] * 6


def test_a_key_that_the_agent_prints_is_masked(world: World) -> None:
    world.model(f"echo {KEY}", "TASK_COMPLETE")
    assert world.run("--task", "leak").status == 0
    assert KEY not in world.everything()


def test_a_key_that_the_screen_wraps_and_colours_is_masked_in_all_that_leaves(world: World) -> None:
    gate, key = Gate(), "sk-or-v1-" + "0123456789abcdef" * 4
    model = world.model(
        f"MEMORY_SAVE: the key is {key}\nclear; printf '%180s\\033[31m%s\\033[32m%s\\033[0m\\n' "
        f"'' {key[:40]} {key[40:]}; cat; exit 3", "KEYS: C-d", gate.reply("TASK_COMPLETE"))
    run = world.start("--json", "--task", "x", CLAUDE_CMD="bash --norc", OPENROUTER_API_KEY=key,
                      TURN_TIMEOUT="2")
    site, streamed = run.site(), []
    reader = threading.Thread(target=lambda: streamed.append(site.ask("/events").text))
    reader.start()
    assert poll(lambda: len(model.requests) == 3, 30), run.stdout
    gate.set()
    run.process.wait(30)
    reader.join(30)
    told = "".join(model.last_message(number) for number in range(3))
    assert "[key]" in told and '"type": "screen"' in streamed[0]
    for text in (told, streamed[0], world.everything(), (world.work / "memory.json").read_text()):
        letters = re.sub(r"\\u001b\[[\d;]*m|\\n|\s", "", text)
        assert key[:36] not in letters and key[36:] not in letters and "[key]" in text


# -- Wrong settings, arguments and surroundings -------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("CLAUDE_TMUX_SESSION", "my session"), ("CLAUDE_TMUX_SESSION", "a:b"),
    ("CLAUDE_TMUX_SOCKET", "a/b"), ("DEFAULT_MODEL", "two words"), ("TERMINATE_WHEN_QUIT", "maybe"),
    ("AUTONOMOUS_MODE", "2"), ("OPENROUTER_MODEL", "two words"), ("OPENROUTER_BASE_URL", "ftp://x"),
    ("OPENROUTER_BASE_URL", "openrouter.ai"), ("MAX_ITERATIONS", "ten"), ("MAX_ITERATIONS", "1.5"),
    ("MAX_ITERATIONS", "-1"), ("MAX_COST", "cheap"), ("MAX_COST", "-0.5"), ("MAX_COST", "nan"),
    ("MAX_MINUTES", "1h"), ("TURN_TIMEOUT", "0"), ("TURN_TIMEOUT", "soon"),
    ("HISTORY_MAX_TOKENS", "many"), ("MEMORY_MAX_FACTS", "0"), ("MEMORY_MAX_FACTS", "few"),
    ("DASHBOARD_ENABLED", "oui"), ("DASHBOARD_HOST", "my host"), ("DASHBOARD_PORT", "web"),
    ("DASHBOARD_PORT", "65536"), ("DASHBOARD_OPEN", "perhaps")])
def test_a_wrong_setting_is_named_in_one_line(name: str, value: str, world: World) -> None:
    assert_refused(world.run("--task", "x", **{name: value}), 2, f"{name}={value!r}", "expected")
    assert not world.journals()


def test_a_wrong_setting_in_the_env_file_is_named_too(world: World) -> None:
    (world.work / ".env").write_text("MAX_COST=cheap\n")
    assert_refused(world.run("--task", "x"), 2, "MAX_COST='cheap'", "expected a number")
    assert_refused(world.run("--task", "x", MAX_COST="1", OPENROUTER_API_KEY=""), 2,
                   "OPENROUTER_API_KEY")


def test_a_wrong_key_is_not_shown(world: World) -> None:
    done = world.run("--task", "x", OPENROUTER_API_KEY=f"{KEY} {KEY}")
    assert_refused(done, 2, "OPENROUTER_API_KEY", "expected one word")
    assert KEY not in done.stderr


def test_a_setting_that_cannot_be_read_from_the_env_file_is_named_and_not_shown(
        world: World) -> None:
    (world.work / ".env").write_text(f"# fine\nOPENROUTER_API_KEY='{KEY}\n")
    done = world.run("--task", "x")
    assert_refused(done, 2, ".env line 2: OPENROUTER_API_KEY")
    assert KEY not in done.stderr


def test_the_env_file_of_another_project_stops_neither_a_chat_nor_a_run(world: World) -> None:
    (world.work / ".env").write_bytes(
        b'PRIVATE_KEY="-----BEGIN PRIVATE KEY-----\nMAX_COST=none\n-----END PRIVATE KEY-----"\n'
        b"[database]\nurl: postgres://\nAPP='never closed\n# Schl\xfcssel\nif [ -f x ]; then\n")
    world.model("echo one", "TASK_COMPLETE")
    for arguments in (["--chat"], ["--task", "x"]):
        done = world.run(*arguments, stdin="echo one\n")
        assert (done.status, done.stderr) == (0, "")


def test_settings_that_run_or_redirect_are_announced_when_they_come_from_the_env_file(
        world: World) -> None:
    model = world.model("TASK_COMPLETE")
    lines = {"CLAUDE_CMD": "bash --norc", "VERIFY_CMD": "true", "OPENROUTER_BASE_URL": model.url}
    (world.work / ".env").write_text(
        "".join(f'{name}="{value}"\n' for name, value in lines.items()))
    done = world.run("--task", "x", CLAUDE_CMD="", OPENROUTER_BASE_URL="")
    assert done.status == 0
    assert len(done.stderr.splitlines()) == 3
    for line, (name, value) in zip(done.stderr.splitlines(), lines.items()):
        assert name in line and value in line and ".env" in line


@pytest.mark.parametrize("arguments, words", [
    (["missing"], ["missing", "no such directory"]), (["file"], ["file", "not a directory"]),
    (["--frobnicate"], ["--frobnicate"]), ([".", "."], ["unrecognized arguments"]),
    (["--task"], ["--task"]), (["--chat", "--task", "x"], ["--task", "--chat"]),
    (["--resume", "--task", "x"], ["--resume", "--task"]),
    (["--demo", "--doctor"], ["--demo", "--doctor"]),
    (["--replay", "missing"], ["missing"]), (["--resume"], ["no run to resume"]),
    (["--task", "  "], ["no task"]), ([], ["no task"])])
def test_wrong_arguments_are_told_in_one_line(
        arguments: list[Any], words: list[str], world: World) -> None:
    (world.work / "file").touch()
    assert_refused(world.run(*arguments), 2, *words)


@pytest.mark.parametrize("settings, words", [
    ({"OPENROUTER_API_KEY": "sk-or-v1-of-somebody-else"}, ["401", "Check OPENROUTER_API_KEY"])])
def test_a_wrong_key_is_told_before_the_task_is_asked_for(
        settings: dict[str, str], words: list[str], world: World) -> None:
    world.model()
    with Terminal([sys.executable, TOOL], {**world.env, **settings}, world.work) as person:
        shown = person.wait_for("orchestrator: ")
        assert person.exit_status() == 6 and "Enter task" not in shown
        assert [word for word in words if word not in shown.replace("\n", "")] == []
    assert_refused(world.run("--task", "x", **settings), 6, *words)
    assert not world.log("pid") and not world.journals() and not world.tmux("list-sessions")


def test_a_server_that_is_not_there_is_waited_for_as_long_as_the_run_may_take(world: World) -> None:
    began = time.monotonic()
    done = world.run("--task", "x", MAX_MINUTES="0.1")
    assert done.status == 3 and "can't be reached" in done.stdout
    assert_one_complaint(done, "MAX_MINUTES=0.1")
    (end,) = world.events("complete")
    assert 6_000 <= end["duration_ms"] < 7_500 and time.monotonic() - began > 6


def test_no_key_is_told_in_one_line(world: World) -> None:
    assert_refused(world.run("--task", "x", OPENROUTER_API_KEY=""), 2, "OPENROUTER_API_KEY")


@pytest.mark.parametrize("missing, settings", [
    ("tmux", {}), ("claude", {"CLAUDE_CMD": ""}),
    ("codex", {"CLAUDE_CMD": "", "DEFAULT_MODEL": "gpt-5"})])
def test_a_missing_program_is_named_with_what_to_do(
        missing: str, settings: dict[Any, Any], world: World) -> None:
    programs = world.directory / "programs"
    programs.mkdir()
    for name in {"tmux", "sh"} - {missing}:
        (programs / name).symlink_to(shutil.which(name) or name)
    for mode in (["--task", "x"], ["--chat"]):
        done = world.run(*mode, PATH=str(programs), **settings)
        assert_refused(done, 5, missing, "install")


def test_the_agent_works_in_the_directory_whatever_that_is_called(world: World) -> None:
    odd = world.directory / "a#[b] #{pid} %H;'"
    odd.mkdir()
    assert world.run("--chat", stdin="echo one\n/quit\n", cwd=odd).status == 0
    assert "echo one" in (odd / "agent.log").read_text()


def test_a_session_made_for_another_directory_is_not_typed_into(world: World) -> None:
    model = world.model("echo mine", "TASK_COMPLETE")
    assert world.run("--task", "x").status == 0
    other = world.directory / "other"
    other.mkdir()
    done = world.run("--task", "x", cwd=other, CLAUDE_TMUX_SESSION="gt-claude-loop")
    assert done.status == 2
    assert_one_complaint(done, "gt-claude-loop", str(world.work), "CLAUDE_TMUX_SESSION")
    assert world.log("took") == ["echo mine"] and len(model.requests) == 2


def test_a_second_project_gets_a_session_of_its_own_and_the_status_tells_of_both(
        world: World) -> None:
    other = world.directory / "other"
    other.mkdir()
    gate = Gate()
    world.model("echo one", gate.reply("TASK_COMPLETE"), "TASK_FAILED: no")
    first = world.start("--task", "The first task")
    assert world.taken("echo one"), first.stdout
    second = world.run("--chat", cwd=other, stdin="echo two\n")
    assert second.status == 0 and "Chat ended: 1 message" in second.stdout
    session, = re.findall(r"attach -t (gt-claude-loop-other-[0-9a-f]{4})", second.stdout)[:1]
    status = world.run("--status")
    assert (status.status, status.stderr) == (0, "")
    one, two, runs = status.stdout.split("\n\n")
    assert f"process {first.process.pid}" in one and "The first task" in one
    assert "Agent:     python" in one and "Agent:     python" in two
    assert first.site().url in one and f"kill {first.process.pid}" in one
    assert f"Session {session}\n" in two and "none" in two and f"kill-session -t {session}" in two
    assert re.search(rf"running +{world.work}: The first task\n", runs)
    assert re.search(rf"complete +{other}: chat\n", runs)
    gate.set()
    assert first.end().status == 0
    done = world.run("--task", "Another", cwd=other)      # again in the session of its own
    assert done.status == 4 and session in done.stdout
    assert world.tmux("list-sessions", "-F", "#{session_name}").split() == [
        "gt-claude-loop", session]


def test_a_second_orchestrator_on_a_session_is_refused(world: World) -> None:
    world.model("sleep 60")
    first = world.start("--task", "x")
    assert world.taken("sleep 60"), first.stdout
    for mode in (["--task", "y"], ["--chat"]):
        assert_refused(world.run(*mode), 2, str(first.process.pid), "CLAUDE_TMUX_SESSION")
    assert first.end(by=signal.SIGTERM).status == 143
    assert world.log("took") == ["sleep 60"]


def test_an_agent_that_ends_at_once_leaves_its_last_words(world: World) -> None:
    world.model("echo never")
    done = world.run("--task", "x", CLAUDE_CMD="echo 'license expired'; exit 3")
    assert done.status == 5
    assert_one_complaint(done, "license expired", "status 3")


# -- Ends ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("status, outcome, replies, settings, words", [
    (0, "complete", ["TASK_COMPLETE"], {}, ""),
    (2, None, [], {"MAX_COST": "much"}, "MAX_COST"),
    (3, "budget", ["echo one", "echo two"], {"MAX_ITERATIONS": "1"}, "MAX_ITERATIONS=1"),
    (3, "budget", ["echo one", "echo two"], {"MAX_COST": "0.01"}, "MAX_COST=0.01"),
    (3, "budget", ["sleep 60"], {"MAX_MINUTES": "0.05"}, "MAX_MINUTES=0.05"),
    (4, "failed", ["TASK_FAILED: there is no coffee"], {}, "there is no coffee"),
    (4, "stuck", ["echo round"] * 9, {}, "no new output"),
    (5, "agent", [], {"CLAUDE_CMD": "echo 'license expired'; exit 3"}, "license expired"),
    (6, "model", [401], {}, "OPENROUTER_API_KEY"),
    (6, "model", [404], {}, "OPENROUTER_MODEL"),
    (130, "interrupted", [signal.SIGINT], {}, ""), (143, "interrupted", [signal.SIGTERM], {}, ""),
    (129, "interrupted", [signal.SIGHUP], {}, "")])
def test_a_shell_sees_how_a_run_has_ended_and_its_events_say_why(
        status: int, outcome: str | None, replies: Any, settings: dict[Any, Any], words: str,
        world: World) -> None:
    locks = world.directory / "state/orchestrator/locks"

    def kill_the_run(number: signal.Signals) -> str:
        os.kill(int(next(locks.iterdir()).read_text().split()[0]), number)
        return "echo late"

    world.model(*(  # a signal comes while the model thinks, to the process that holds the lock
        functools.partial(kill_the_run, reply)
        if isinstance(reply, signal.Signals) else reply for reply in replies))
    done = subprocess.run(
        ["sh", "-c", '"$@"; echo "status $?" >&2', "sh", sys.executable, TOOL, "--json", "--task",
         "x"], cwd=world.work, env={**world.env, **settings}, capture_output=True, text=True,
        timeout=90)
    *said, ended = done.stderr.splitlines()
    said = [line for line in said if not line.startswith("Dashboard: ")]
    assert ended == f"status {status}" and len(said) == bool(words), done.stderr
    assert all(line.startswith("orchestrator: ") and words in line for line in said), said
    events = list(map(json.loads, done.stdout.splitlines()))
    assert events == world.events()
    assert [event["outcome"] for event in events[-1:] if event["type"] == "complete"] == (
        [outcome] if outcome else [])


def test_a_run_needs_no_terminal_no_home_and_no_locale(world: World) -> None:
    model = world.model("echo ä", "TASK_COMPLETE")
    kept = ("TMUX_TMPDIR", "XDG_STATE_HOME", "OPENROUTER_API_KEY", "OPENROUTER_BASE_URL",
            "CLAUDE_CMD", "CONFIRM_COMPLETE")
    done = subprocess.run([sys.executable, TOOL, "--task", "ü"], cwd=world.work, timeout=60,
                          env={name: world.env[name] for name in kept}, stdin=subprocess.DEVNULL,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, b""), done
    assert "\nä" in model.last_message() and b"\x1b" not in done.stdout


@pytest.mark.parametrize("replies", [
    [f"echo step {number}" for number in range(1, 8)], ["count the files that are done"] * 7])
def test_a_run_that_gets_on_is_not_taken_for_one_that_goes_in_circles(
        replies: Any, world: World) -> None:
    model = world.model(*replies, "TASK_COMPLETE")
    done = world.run("--task", "x")
    assert (done.status, done.stderr) == (0, "")
    assert re.search(r"\n(7 of 99|step 7)\b", model.last_message())


@pytest.mark.parametrize("moment, number, terminate", [
    ("agent", signal.SIGINT, "false"), ("agent", signal.SIGTERM, "true"),
    ("model", signal.SIGINT, "true"), ("check", signal.SIGHUP, "false"),
    ("summary", signal.SIGTERM, "false"), ("person", signal.SIGHUP, "true")])
def test_a_signal_ends_a_run_in_order_while_it_waits_for_the(
        moment: str, number: Any, terminate: str, world: World) -> None:
    gate = Gate()
    late = gate.reply("echo late")
    scripts: dict[str, list[Any]] = {
        "agent": ["echo one", "sleep 60"], "model": [late], "check": ["TASK_COMPLETE"],
        "summary": ["echo one", "echo two", "echo three", "echo four", late],
        "person": ["sleep 1", "echo late"]}
    script = scripts[moment]
    model = world.model(*([late] if moment == "model" else [f"MEMORY_SAVE: a\n{script[0]}"]),
                        *script[1:])
    run = world.start("--task", "x", TERMINATE_WHEN_QUIT=terminate, VERIFY_CMD="exec sleep 54321",
                      HISTORY_MAX_TOKENS="1" if moment == "summary" else "60000")
    site = run.site()
    stream: list[Event] = []
    reader = threading.Thread(target=lambda: stream.extend(site.each()))
    reader.start()
    if moment == "person":
        assert world.taken("sleep 1") and site.control("pause") == 204
    waits = {"agent": lambda: "sleep 60" in world.log("took"),
             "model": lambda: model.requests, "summary": lambda: len(model.requests) == 5,
             "check": lambda: b"sleep\00054321" in b"".join(
                 processes_of(world.directory).values()),
             "person": lambda: world.events("iteration_end")}
    assert poll(waits[moment], 30), run.stdout
    assert poll(lambda: stream, 30)
    done = run.end(30, by=number)
    gate.set()
    reader.join(30)
    assert (done.status, done.stderr) == (128 + number, "")
    end = world.events()[-1]
    assert (end["type"], end["outcome"], end["reason"]) == ("complete", "interrupted", number.name)
    assert [event["id"] for event in stream] == [event["id"] for event in world.events()]
    assert (world.work / "memory.json").exists() == (moment != "model")
    session = "" if terminate == "true" else "gt-claude-loop"
    assert world.tmux("list-sessions", "-F", "#{session_name}") == session


def test_a_second_signal_leaves_at_once_while_the_first_is_dealt_with(world: World) -> None:
    world.model("sleep 60")
    run = world.start("--task", "x", TERMINATE_WHEN_QUIT="true")
    assert world.taken("sleep 60"), run.stdout
    server = int(world.tmux("display-message", "-p", "#{pid}"))
    os.kill(server, signal.SIGSTOP)
    try:        # to end its session takes as long as tmux is given for an answer
        run.process.send_signal(signal.SIGINT)
        assert poll(lambda: world.events("complete"), 30)
        done = run.end(4, by=signal.SIGINT)
    finally:
        os.kill(server, signal.SIGCONT)
    assert (done.status, done.stderr) == (130, "")
    assert kinds(world.events()).count("complete") == 1


def test_a_hangup_that_is_ignored_ends_nothing(world: World) -> None:
    world.model("sleep 2")
    tool = shlex.join([sys.executable, str(TOOL), "--task", "x", "--json"])
    with Terminal(["sh", "-c", f"nohup {tool} > out 2>&1 & echo $! > pid; sleep 1000"],
                  world.env, world.work) as terminal:
        assert world.taken("sleep 2"), terminal.screen()
        os.kill(int((world.work / "pid").read_text()), signal.SIGHUP)
    assert poll(lambda: world.events("complete"), 30)
    assert world.events()[-1]["reason"].endswith("script ended")


IN_BASH = ["bash", "-c", 'stty -a > before; trap : INT; "$@"; echo "status $?"; stty -a > after; '
           "cmp before after && echo sane; exec sleep 1000", "bash", sys.executable, str(TOOL)]


def test_ctrl_c_in_a_chat_gives_the_prompt_back_and_at_the_prompt_leaves_a_sane_terminal(
        world: World) -> None:
    with Terminal([*IN_BASH, "--chat"], world.env, world.work) as terminal:
        terminal.wait_for("\n>", 30)
        terminal.type("sleep 3 && echo finished")
        terminal.send_keys("Enter")
        assert world.taken("sleep 3 && echo finished")
        terminal.send_keys("C-c")
        terminal.wait_for("keeps working")
        assert poll(lambda: world.log("done"), 30)
        terminal.type("echo two")
        terminal.send_keys("Enter")
        assert "finished" in terminal.wait_for("\ntwo\n")
        assert poll(lambda: terminal.screen().endswith("\n>"), 15), terminal.screen()
        terminal.type("half a li")
        terminal.send_keys("C-c")
        terminal.wait_for("/quit to leave")
        terminal.send_keys("C-c")
        terminal.wait_for("sane")
        assert "status 0" in terminal.screen() and "Traceback" not in terminal.screen()
    assert world.events()[-1]["outcome"] == "complete"


def test_a_chat_whose_terminal_is_closed_ends_the_session_that_is_not_to_stay(world: World) -> None:
    world.env["TERMINATE_WHEN_QUIT"] = "true"
    with chatting(world, "sh", "-c", '"$@"; true', "sh"):
        assert world.tmux("list-sessions")
    assert poll(lambda: not processes_of(world.directory), 10), processes_of(world.directory)
    assert not world.tmux("list-sessions") and world.events("complete")


@pytest.mark.parametrize("key", ["Enter", "C-c"])
def test_the_dashboard_stays_for_a_person_who_has_opened_it_until(key: str, world: World) -> None:
    gate = Gate()
    world.model(gate.reply("TASK_COMPLETE"))
    with Terminal([*IN_BASH, "--task", "x"], world.env, world.work) as terminal:
        terminal.wait_for("Dashboard:", 30)
        site = Site(found(r"Dashboard: (\S+)", terminal.screen())[1])
        assert site.events(lambda event: event["type"] == "task_info")
        terminal.send_keys("Enter")         # too early to be an answer
        gate.set()
        terminal.wait_for("until you press Enter or Ctrl-C")
        assert site.ask("/").status == 200 and site.control("note", "too late") == 204
        assert kinds(site.events(lambda event: event["type"] == "complete"))[0] == "task_info"
        terminal.send_keys(key)
        terminal.wait_for("sane")
        assert "status 0" in terminal.screen()
    assert world.events()[-1]["outcome"] == "complete"


@pytest.mark.parametrize("fetches", [0, 1])
def test_the_prompt_comes_back_at_once_where_nobody_has_opened_the_dashboard(
        fetches: int, world: World) -> None:
    gate = Gate()
    world.model(gate.reply("TASK_COMPLETE"))
    with Terminal([*IN_BASH, "--task", "x"], world.env, world.work) as terminal:
        terminal.wait_for("Dashboard:", 30)
        for _ in range(fetches):        # as curl does; a browser reads the events, too
            Site(found(r"Dashboard: (\S+)", terminal.screen())[1])
        gate.set()
        assert "stays open" not in terminal.wait_for("status 0", 30)


def test_a_page_that_was_fetched_at_the_last_moment_still_gets_the_events(world: World) -> None:
    gate = Gate()
    world.model(gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    gate.set()
    assert poll(lambda: world.events("complete"), 30)
    assert kinds(site.events(lambda event: event["type"] == "complete"))[0] == "task_info"
    assert run.end().status == 0


@pytest.mark.parametrize("arguments, redirected, said", [
    ("", "| head -n 1 > first", ""),
    ("", "<&- >&- 2>&-", ""), ("--json", "> /dev/full", "No space left")])
def test_a_run_goes_on_when_nobody_can_hear_it(
        arguments: str, redirected: str, said: str, world: World) -> None:
    world.model("echo one", "echo two", "TASK_COMPLETE")
    tool = shlex.join([sys.executable, str(TOOL), "--task", "x"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {tool} {arguments} {redirected}"], cwd=world.work,
        env={**world.env, "DASHBOARD_ENABLED": "off"}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and world.log("took") == ["echo one", "echo two"]
    assert said in done.stderr and len(done.stderr.splitlines()) == bool(said), done.stderr


def test_a_busy_model_is_asked_again(world: World) -> None:
    model = world.model((429, {"Retry-After": "1"}), 503, "TASK_COMPLETE")
    done = world.run("--task", "x", MAX_ITERATIONS="1")
    assert done.status == 0 and len(model.requests) == 3
    assert [("429" in e["error"], "503" in e["error"]) for e in world.events("error")] == [
        (True, False), (False, True)]


def test_a_long_turn_is_reported_and_waited_for(world: World) -> None:
    model = world.model("sleep 5 && echo finished", "WAIT: 2m", "KEYS: e c h o Space x Enter",
                        "TASK_COMPLETE")
    assert world.run("--task", "x", TURN_TIMEOUT="2").status == 0
    shown = [model.last_message(number) for number in (1, 2, 3)]
    assert ["still working" in text for text in shown] == [True, False, False]
    assert ["\nfinished" in text for text in shown] == [False, True, False]
    assert world.log("took") == ["sleep 5 && echo finished", "echo x"]


def test_the_check_has_to_pass_before_the_task_is_complete(world: World) -> None:
    check = "test -e proof || { echo no proof yet; exit 9; }"
    model = world.model("TASK_COMPLETE", "touch proof", "TASK_COMPLETE")
    assert world.run("--task", "x", VERIFY_CMD=check, CLAUDE_CMD="bash --norc").status == 0
    assert "no proof yet" in model.last_message(1) and "status 9" in model.last_message(1)
    assert [(e["command"], e["status"]) for e in world.events("verify")] == [(check, 9), (check, 0)]


def test_a_run_is_not_complete_while_the_agent_works_or_asks(
        new_world: Callable[..., World]) -> None:
    replies = ["sleep 5 && echo 1 failed", "TASK_COMPLETE", "WAIT: 2m",
               "choose Overwrite?/*Yes/No", "TASK_COMPLETE", "KEYS: Down Enter", "do 1"]
    worlds = at_once(new_world, {
        "confirm": [*replies, "TASK_COMPLETE", {"CONFIRM_COMPLETE": "true"}],
        "verify": [*replies, {"VERIFY_CMD": "date >> ../checks; test -e did"}]},
        prepare=as_claude, TURN_TIMEOUT="3")
    for world in worlds.values():
        shown = [world.said.last_message(number) for number in range(2, 6)]
        assert ["did nothing: Claude Code is still working" in text for text in shown] == [
            True, False, False, False], shown
        assert ["stands unanswered" in text for text in shown] == [False, False, False, True], shown
        assert world.log("chose") == ["No"] and world.events()[-1]["outcome"] == "complete"
        assert world.events()[-1]["files_changed"] >= 1
    assert (worlds["verify"].directory / "checks").read_text().count("\n") == 1
    assert "Messages sent to" in worlds["confirm"].said.last_message()


@pytest.mark.parametrize("mode", ["autonomous", "chat"])
@pytest.mark.parametrize("terminate", ["true", "false"])
def test_the_session_is_kept_for_the_next_run_unless_it_is_to_be_terminated(
        terminate: str, mode: str, world: World) -> None:
    for word in ("one", "two"):
        world.model(f"echo {word}", "TASK_COMPLETE")
        arguments = ["--task", "x"] if mode == "autonomous" else ["--chat"]
        done = world.run(*arguments, stdin=f"echo {word}\n/quit\n", TERMINATE_WHEN_QUIT=terminate)
        assert (done.status, done.stderr) == (0, "")
        sessions = world.tmux("list-sessions", "-F", "#{session_name}")
        assert sessions == ("" if terminate == "true" else "gt-claude-loop")
    assert world.log("took") == ["echo one", "echo two"]
    assert len(set(world.log("pid"))) == (2 if terminate == "true" else 1)


# -- A rough night ------------------------------------------------------------------------------

def piece(text: str, finish: str | None = None, **more: Any) -> str:
    """Return a piece of a streamed answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


def fault(code: Any, message: str = "as it happens", **more: Any) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"code": code, "message": message, **more}}


def streams(*pieces: Any, ended: bool = True) -> Callable[[Exchange], None]:
    """Return what sends pieces of a stream, each a text or a pause, and ends it or just stops."""
    def send(exchange: Exchange) -> None:
        exchange.start_stream()
        for each in [*pieces, *["data: [DONE]\n\n", ""][:2 * ended]]:
            time.sleep(each) if isinstance(each, float) else exchange.stream(each)
        exchange.close_connection = True

    return send


WRONG: list[Callable[[Exchange], None]] = [      # ways in which an answer can be none
    lambda exchange: exchange.send(fault(429), 429, {"Retry-After": "1"}),
    lambda exchange: exchange.send(fault(502, metadata={"raw": "upstream"}), 502),
    streams(piece("ec"), ended=False), lambda exchange: exchange.send(fault(503, "busy")),
    lambda exchange: exchange.connection.shutdown(socket.SHUT_RDWR),
    streams(piece("", "stop")), lambda exchange: exchange.send("<html>Bad gateway</html>", 502),
    streams(piece("ec"), piece("", "error", **fault(502, "provider disconnected"))),
    lambda exchange: exchange.send({"choices": []}), streams(piece("ec"), "data: {", ended=False),
    streams(": OPENROUTER PROCESSING\n\n", 0.5, ": OPENROUTER PROCESSING\n\n", 0.5),
    lambda exchange: exchange.send(fault(403, "flagged", metadata={"reasons": ["x"]}), 403),
    lambda exchange: exchange.send(fault("rate_limit_exceeded", availability={"retry_after": 1})),
    lambda exchange: exchange.send(fault(400, "stream_options: unknown"), 400)
    if "stream_options" in exchange.body else exchange.send(fault(529), 529),
    lambda exchange: exchange.send(fault(402, "You can only afford 9000"), 402)
    if exchange.body["max_tokens"] > 9000 else exchange.send(fault(524), 524),
    lambda exchange: exchange.send(fault(400, "prompt is too long"), 400)
    if len(exchange.body["messages"]) > 14 else exchange.send(fault(500), 500)]


class RoughModel(ScriptedModel):
    """A model that says its replies in turn, but answers one call in five in another way.

    Never more than two in a row, so that no run ends by bad luck.  One reply in ten comes in two
    parts, and after a pause.
    """

    def __init__(self, replies: Sequence[str]) -> None:
        super().__init__(replies)
        self.rest = ""                          # of a reply that was cut at its length
        self.wrong = self.summaries = self._row = 0
        self.characters: list[int] = []         # of the prompts
        self._chance = random.Random(1)

    def answer(self, exchange: Exchange) -> None:
        if exchange.command == "GET":
            super().answer(exchange)
            return
        texts = [text_of(message["content"]) for message in exchange.body["messages"]]
        self.requests.append(Request(exchange.headers, {}))
        self.characters.append(sum(map(len, texts)))
        self._row = self._row + 1 if self._chance.random() < 0.2 and self._row < 2 else 0
        if self._row:
            self.wrong += 1
            WRONG[self.wrong % len(WRONG)](exchange)
        elif "Summarise the session" in texts[-1]:
            self.summaries += 1
            self._complete(exchange, 1, "All went well so far.")
        elif "Continue exactly where it stopped" in texts[-1]:
            self._complete(exchange, 1, self.rest)
        elif self._chance.random() < 0.1 and len(self.replies[0]) > 20:
            reply, (self.rest, self.replies[:1]) = self.replies[0], (self.replies[0][9:], [])
            streams(": OPENROUTER PROCESSING\n\n", 0.5, piece(reply[:9], "length"))(exchange)
        else:
            self._complete(exchange, 1, self.replies.pop(0))


def memory_of(pid: int) -> dict[str, int]:
    """Return what a process has in memory now and has had at most, in KB."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return {name: int(size) for name, size in re.findall(r"Vm(RSS|HWM):\s+(\d+) kB", status)}


@pytest.mark.parametrize("turns", [15, pytest.param(300, id="300 for a benchmark")])
def test_a_run_completes_through_a_night_of_failures(
        turns: int, world: World, request: pytest.FixtureRequest) -> None:
    if turns > 15:
        request.getfixturevalue("asked_for")
    bound = 12_000      # tokens
    orders = [f"echo {number} {'y' * (100 + 37 * number % 1900)}" for number in range(turns)]
    with RoughModel([*orders, "TASK_COMPLETE"]) as model:
        run = world.start("--task", "x", OPENROUTER_BASE_URL=model.url,
                          HISTORY_MAX_TOKENS=str(bound), TERMINATE_WHEN_QUIT="true")
        memory: list[dict[str, int]] = []
        while run.process.poll() is None:
            with contextlib.suppress(OSError):
                memory += filter(None, [memory_of(run.process.pid)])
            time.sleep(0.5)
        done = run.end(5)
    assert (done.status, done.stderr) == (0, "")
    assert world.log("took") == orders
    assert max(model.characters) <= 4 * bound
    end = world.events("complete")[0]
    sizes, most = [each["RSS"] for each in memory], max(each["HWM"] for each in memory)
    print(f"\n{turns} turns: {len(model.characters)} calls, {model.wrong} went wrong, "
          f"{len(world.events('error'))} retries and repairs, {model.summaries} summaries; prompts "
          f"of {max(model.characters):,} characters at most (bound {4 * bound:,}); "
          f"{end['tokens']['total']:,} tokens, ${end['cost']:.2f}, "
          f"{end['duration_ms'] / 1000:.0f} s; memory {sizes[len(sizes) // 4]:,} KB after a "
          f"quarter, {sizes[-1]:,} KB at the end, {most:,} KB at most")
    assert most < 60_000


# -- The README ---------------------------------------------------------------------------------

README = TOOL.with_name("README.md")
ADDRESS = "https://example.com/"        # stands for the place where the file is kept


def readme_blocks() -> list[str]:
    """Return the commands, manifests and programs that the README shows; none if it isn't ours.

    Among them are the commands with arguments within its sentences.
    """
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if not text.startswith("# orchestrator\n"):
        return []
    blocks = re.findall(r"(?ms)^```(?:sh|yaml|python)\n(.*?)^```$", text)
    prose = re.sub(r"(?ms)^```.*?^```$|^\|.*?$", "", text)
    programs = r"curl|find|parallel|python3 orchestrator\.py|ssh"
    return blocks + re.findall(f"`((?:{programs}) [^`]+)`", prose)


def readme_block(fragment: str) -> str:
    """Return the block of the README that has this in it; skip the test of a vendored copy."""
    if not readme_blocks():
        pytest.skip("there is no README.md of ours beside the file: it was vendored")
    block, = (block for block in readme_blocks() if fragment in block)
    return block.replace(ADDRESS, f"{TOOL.parent.as_uri()}/")


class Reader:
    """A new user: a home with the file and a project in it, and all that the README asks for.

    What installs, logs in or sends something only notes how it was called.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.home = world.home
        self.files = world.home / "orchestrator"
        self.project = world.home / "src/project"
        self.project.mkdir(parents=True)
        self.files.mkdir()
        (self.files / "orchestrator.py").symlink_to(TOOL)
        (self.project / "test_sample.py").write_text("def test_sample():\n    assert True\n")
        world.program("python3", f'exec {sys.executable} "$@"')
        for name in ("sudo", "apt-get", "npm", "ssh", "mail"):
            world.program(name, f'echo {name} "$@" >> {world.directory}/called; cat >> '
                          f"{world.directory}/sent")
        world.program("claude", 'echo "9.9.9 --dangerously-skip-permissions --setting-sources"\n'
                      f'echo claude "$@" >> {world.directory}/called')
        self.env = {**world.env, "PATH": world.program("sudo", 'exec "$@"')}

    def follow(self, fragment: str, *, more: str = "", stdin: str = "", **settings: str) -> Done:
        """Do as a block of the README says, in the directory of the file."""
        for program in ("curl", "parallel"):
            if f"{program} -" in readme_block(fragment) and not shutil.which(program):
                pytest.skip(f"{program} is not installed")
        command = f"set -e\n{readme_block(fragment)}\n{more}"
        done = subprocess.run(["sh", "-c", command], cwd=self.files, input=stdin, text=True,
                              env={**self.env, **settings}, capture_output=True, timeout=90)
        return Done(done.returncode, done.stdout, done.stderr)

    def called(self) -> list[str]:
        """Return how the programs were called that only note that."""
        path = self.world.directory / "called"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def reader(world: World) -> Reader:
    return Reader(world)


FOLLOWED = {        # what is in each block of the README, and what the test of it is about
    "install -y python3 tmux": "demo", "| python3 - --demo": "demo",
    "npm install -g": "setup", "curl -fsSLO": "setup", "MAX_COST=2": "run", "--chat": "chat",
    "nohup": "unattended", "ssh -L": "tunnel", "find ~": "journals", "xargs": "many",
    "parallel -j": "many", "#SBATCH": "many", "kind: Job": "kubernetes", "import Agent": "library",
    "python3-pytest": "development", "GOOSE": "development (a unit test)"}


def test_each_block_of_the_readme_is_followed_by_a_test() -> None:
    for block in readme_blocks():
        assert len([fragment for fragment in FOLLOWED if fragment in block]) == 1, block
    for fragment in FOLLOWED:
        readme_block(fragment)


@pytest.mark.parametrize("fragment", ["install -y python3 tmux", "| python3 - --demo"])
def test_the_demo_of_the_readme_completes(fragment: str, reader: Reader) -> None:
    done = reader.follow(fragment)
    assert (done.status, done.stderr) == (0, "") and "Task complete" in done.stdout
    assert reader.called() == (
        ["apt-get update", "apt-get install -y python3 tmux"] if "tmux" in fragment else [])


def test_the_setup_of_the_readme_gets_an_agent_the_file_and_the_key(reader: Reader) -> None:
    shutil.rmtree(reader.files)
    reader.files = reader.home
    assert reader.follow("npm install -g").status == 0
    assert list(map(str.strip, reader.called())) == [
        "npm install -g @anthropic-ai/claude-code", "claude"]
    model = reader.world.model()
    done = reader.follow("curl -fsSLO", CLAUDE_CMD="", OPENROUTER_API_KEY="", IS_SANDBOX="1",
                         OPENROUTER_BASE_URL=model.url)
    assert "FAILED" not in done.stdout and (done.status, done.stderr) == (0, ""), done
    assert re.search(r"^model\s+ok", done.stdout, re.M)
    reader.files = reader.home / "orchestrator"
    assert (reader.files / "orchestrator.py").read_bytes() == TOOL.read_bytes()
    assert (reader.files / ".env").stat().st_mode & 0o777 == 0o600


def test_the_run_of_the_readme_works_in_the_project_and_is_checked(reader: Reader) -> None:
    model = reader.world.model("echo one", "TASK_COMPLETE")
    done = reader.follow("MAX_COST=2", OPENROUTER_BASE_URL=model.url)
    assert (done.status, done.stderr) == (0, ""), done
    assert reader.world.events("task_info")[0]["workdir"] == str(reader.project)
    verified, = reader.world.events("verify")
    assert "1 passed" in verified["output"]


def test_the_chat_of_the_readme_needs_no_key(reader: Reader) -> None:
    done = reader.follow("--chat", stdin="echo one\n/quit\n", OPENROUTER_API_KEY="")
    assert (done.status, done.stderr) == (0, "") and "\none" in done.stdout


def test_the_unattended_run_of_the_readme_tells_its_end_by_mail(reader: Reader) -> None:
    model = reader.world.model("echo one", "TASK_COMPLETE", "TASK_COMPLETE")
    done = reader.follow("nohup", more="wait", OPENROUTER_BASE_URL=model.url)
    assert (done.status, done.stdout, done.stderr) == (0, "", ""), done
    assert "Task complete" in (reader.files / "run.log").read_text()
    assert reader.called() == ["mail -s Run: complete you@example.com"]
    assert (reader.world.directory / "sent").read_text().strip()


def test_the_tunnel_and_the_server_of_the_readme_are_as_their_programs_take_them(
        reader: Reader) -> None:
    assert reader.follow("ssh -L").status == 0
    forward, = re.findall(r"-L (\S+)", reader.called()[0])
    assert re.fullmatch(r"\d+:127\.0\.0\.1:\d+", forward)
    names = "OPENROUTER_BASE_URL", "OPENROUTER_MODEL", "OPENROUTER_API_KEY"
    text = README.read_text(encoding="utf-8")
    settings = {name: found(f"`{name}=([^`]+)`", text)[1] for name in names}
    code = ("import orchestrator, os; config = orchestrator.Config.from_env(os.environ, {}); "
            "print(config.openrouter_base_url, config.openrouter_model)")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=reader.files, text=True,
                          env={**reader.env, **settings}, capture_output=True, timeout=60)
    assert done.stdout == "http://127.0.0.1:11434/v1 qwen3:32b\n", done


def test_the_readme_deletes_old_journals_only(reader: Reader) -> None:
    runs = reader.home / ".local/state/orchestrator/runs"
    runs.mkdir(parents=True)
    for name, days in (("old.jsonl", 40), ("new.jsonl", 20)):
        (runs / name).touch()
        os.utime(runs / name, (time.time() - days * 86400,) * 2)
    assert reader.follow("find ~").status == 0
    assert [path.name for path in runs.iterdir()] == ["new.jsonl"]


class ModelOfMany(ScriptedModel):
    """A model that gives each of several runs its first reply, its second and so on."""

    def choose(self, number: int, messages: Sequence[Any]) -> Any:
        return self.replies[sum(each["role"] == "assistant" for each in messages)]


@pytest.mark.parametrize("fragment", ["xargs", "parallel -j", "#SBATCH"])
def test_four_runs_at_once_each_complete_in_their_own_directory_and_session(
        fragment: str, reader: Reader) -> None:
    places = [reader.files / "tasks" / name for name in ("ant", "bee", "cat", "dog")]
    for place in places:
        place.mkdir(parents=True)
        (place / "TASK").write_text(f"Be a {place.name}.\n")
    model = ModelOfMany(["MEMORY_SAVE: a fact\necho one", "echo two", *["TASK_COMPLETE"] * 2])
    with model:
        settings = {"OPENROUTER_BASE_URL": model.url, "TERMINATE_WHEN_QUIT": "true"}
        if fragment == "#SBATCH":       # as Slurm does, which runs the script once for each task
            numbers = [{"SLURM_ARRAY_TASK_ID": str(each), "SLURM_JOB_ID": f"7{each}"}
                       for each in range(1, 5)]
            with concurrent.futures.ThreadPoolExecutor() as pool:
                ends = list(pool.map(
                    lambda own: reader.follow(fragment, **settings, **own), numbers))
        else:
            ends = [reader.follow(fragment, **settings)]
    assert [(done.status, done.stdout) for done in ends] == [(0, "")] * len(ends), ends
    sessions, addresses = set(), set(re.findall(r"http://\S+", "".join(end.stderr for end in ends)))
    for place in places:
        events = list(map(json.loads, (place / "events.jsonl").read_text().splitlines()))
        sessions.add(events[0]["attach"])
        assert (events[0]["task"], events[0]["workdir"]) == (f"Be a {place.name}.", str(place))
        assert events[-1]["outcome"] == "complete"
        log = list(map(json.loads, (place / "agent.log").read_text().splitlines()))
        assert [entry["took"] for entry in log if "took" in entry] == ["echo one", "echo two"]
        assert json.loads((place / "memory.json").read_text()) == ["a fact"]
    assert len(sessions) == len(addresses) == 4


def test_the_kubernetes_job_of_the_readme_is_one_and_its_command_completes(reader: Reader) -> None:
    manifest = readme_block("kind: Job")
    script, = re.findall(r"command: \[sh, -c, '(.*)'\]", manifest)
    place = reader.files / "tasks/0"
    place.mkdir(parents=True)
    (place / "TASK").write_text("Be a pod.\n")
    model = reader.world.model("echo one", "TASK_COMPLETE", "TASK_COMPLETE")
    script = script.replace("/orchestrator.py", str(TOOL)).replace("/tasks/", "tasks/")
    done = subprocess.run(
        ["sh", "-c", script], cwd=reader.files, capture_output=True, text=True, timeout=60,
        env={**reader.env, "JOB_COMPLETION_INDEX": "0", "OPENROUTER_BASE_URL": model.url})
    assert done.returncode == 0, done
    assert json.loads(done.stdout.splitlines()[-1])["outcome"] == "complete"
    checker = shutil.which("kubernetes-validate")
    if not checker:
        pytest.skip("kubernetes-validate is not installed: the manifest was not checked")
    for text, status in ((manifest, 0), (manifest.replace("completions: 4", "completions: x"), 1)):
        (reader.files / "job.yaml").write_text(text)
        assert subprocess.run([checker, "--strict", reader.files / "job.yaml"]).returncode == status


def test_the_library_example_of_the_readme_completes(reader: Reader) -> None:
    """With another agent, and a model of ours."""
    model = reader.world.model("echo $((6 * 7))", "TASK_COMPLETE", "TASK_COMPLETE")
    example = readme_block("import Agent").replace("https://openrouter.ai/api/v1", model.url)
    program = reader.files / "example.py"
    program.write_text("from orchestrator import AgentProfile\n" + example.replace(
        '"claude"', 'AgentProfile.from_command("bash --norc")'))
    done = subprocess.run([sys.executable, "-B", program], cwd=reader.files, env=reader.env,
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.splitlines()[-1] == "complete" and "iteration_end" in done.stdout
    assert "\n42" in model.last_message(1)


def test_the_test_command_of_the_readme_is_that_of_the_ci(reader: Reader) -> None:
    reader.world.program("python3", f'echo python3 "$@" >> {reader.world.directory}/called')
    assert reader.follow("python3-pytest").status == 0
    assert reader.called() == [
        "apt-get update", "apt-get install -y python3-pytest tmux", "python3 -m pytest"]
    ci = TOOL.with_name(".ci") / "run"
    if ci.exists():
        assert "python3 -m pytest" in ci.read_text().splitlines()[-1]


# -- Memory -------------------------------------------------------------------------------------

def test_facts_of_one_run_are_told_to_the_next(world: World) -> None:
    world.model("MEMORY_SAVE: tea at five",
                "MEMORY_SAVE: tea at five\nMEMORY_SAVE: no milk\necho x", "TASK_COMPLETE")
    assert world.run("--task", "x").status == 0
    assert world.log("took") == ["echo x"]
    assert json.loads((world.work / "memory.json").read_text()) == ["tea at five", "no milk"]
    model = world.model("TASK_COMPLETE")
    assert world.run("--task", "y").status == 0
    system = text_of(model.requests[0].body["messages"][0]["content"])
    told = system.split("## Memory from previous sessions\n")[1]
    assert "tea at five" in told and "no milk" in told


class Archivist(ScriptedModel):
    """A model that saves facts with each message, and merges them where it is asked to."""

    def choose(self, number: int, messages: Sequence[Any]) -> Any:
        if "facts remembered" not in text_of(messages[0]["content"]):
            return self.replies.pop(0)
        words = " ".join(json.loads(text_of(messages[-1]["content"]))["facts"]).split()
        return json.dumps({"facts": [" ".join(words[part::30]) for part in range(30)]})


def test_two_runs_that_save_a_thousand_facts_at_once_lose_none_while_one_compacts(
        world: World) -> None:
    runs = []
    with contextlib.ExitStack() as stack:
        for name, most in (("one", "60"), ("two", "9999")):
            replies = ["\n".join([*(f"MEMORY_SAVE: {name}-{number}"
                                    for number in range(at, at + 20)), f"echo {name} at {at}"])
                       for at in range(0, 500, 20)]
            model = stack.enter_context(Archivist([*replies, "TASK_COMPLETE"]))
            runs.append(world.start("--task", "x", OPENROUTER_BASE_URL=model.url,
                                    CLAUDE_TMUX_SESSION=name, MEMORY_MAX_FACTS=most))
        assert [run.end()[::2] for run in runs] == [(0, "")] * 2
    known = " ".join(json.loads((world.work / "memory.json").read_text())).split()
    assert sorted(known) == sorted(f"{name}-{number}" for name in ("one", "two")
                                   for number in range(500))
    compacted = sum("compacted" in line for path in world.journals()
                    for line in path.read_text().splitlines())
    print(f"\n{len(known)} facts of two runs, {compacted} compactions")
    assert compacted


# -- A world that fails -------------------------------------------------------------------------

def in_its_own_mounts(*mounts: str) -> list[str]:
    """Return a command that runs another one where these were mounted, for its eyes only.

    What is in the state directory then is copied to `kept`.
    """
    script = "; ".join(["set -e", *mounts, "cd .", "set +e", '"$@"', "status=$?",
                        'cp -r "$XDG_STATE_HOME" ../kept', "exit $status"])
    within = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces need to be root here")
    return within


@pytest.mark.parametrize("full", [True, False], ids=["full", "read-only"])
def test_a_run_goes_on_and_says_so_once_where_nothing_can_be_written(
        full: bool, world: World) -> None:
    state = Path(world.env["XDG_STATE_HOME"])
    state.mkdir()
    model = world.model("MEMORY_SAVE: a", f"echo b {'x' * 4000}", "TASK_COMPLETE")
    kind, fill = ("size=8k", "head -c 8192 /dev/zero > big") if full else ("ro", "true")
    done = world.run("--task", "x", CLAUDE_CMD="bash --norc", VERIFY_CMD="true",
                     within=in_its_own_mounts(
                         f"mount -t tmpfs -o {kind} tmpfs {state}; cd {world.home}",
                         f"mount -t tmpfs -o {kind} tmpfs {world.work}; cd {world.work}; {fill}"))
    assert (done.status, done.stderr) == (0, ""), done
    for what in ("the journal", "memory.json"):
        said = [line for line in done.stdout.splitlines() if f"{what} can't be written" in line]
        assert len(said) == 1, done.stdout
        assert ("No space left" if full else "Read-only file system") in said[0]
    assert "b xxx" in model.last_message()
    kept = [line for path in (world.directory / "kept").glob("*/runs/*")
            for line in path.read_bytes().splitlines()]
    assert all(map(parsed, kept)) and bool(kept) == full
    assert list(world.work.iterdir()) == []


def test_a_run_goes_on_and_says_so_when_its_directory_is_deleted_under_it(world: World) -> None:
    gate = Gate()
    model = world.model("echo one", gate.reply("MEMORY_SAVE: a\necho two"), "TASK_COMPLETE",
                        "TASK_FAILED: no more")
    run = world.start("--task", "x", CLAUDE_CMD="bash --norc", VERIFY_CMD="true")
    assert poll(lambda: len(model.requests) == 2, 30), run.stdout
    world.work.rmdir()
    gate.set()
    done = run.end()
    world.work.mkdir()
    assert done.status == 4
    assert_one_complaint(done, "no more")
    assert "\ntwo" in model.last_message(2) and "it can't be run" in model.last_message(3)
    assert "memory.json can't be written" in done.stdout
    assert world.events()[-1]["outcome"] == "failed"


def test_too_few_files_for_a_run_are_one_line(world: World) -> None:
    world.model("echo one", "TASK_COMPLETE")
    done = world.run("--task", "x", within=["bash", "-c", 'ulimit -n 12; "$@"', "bash"])
    assert done.status == 5
    assert_one_complaint(done, "Too many open files")


# -- Options ------------------------------------------------------------------------------------

def test_json_prints_the_events_and_nothing_else(world: World) -> None:
    world.model("echo one", "TASK_COMPLETE")
    done = world.run("--json", "--task", "x")
    assert done.status == 0
    assert [json.loads(line) for line in done.stdout.splitlines()] == world.events()
    assert kinds(world.events())[::len(world.events()) - 1] == ["task_info", "complete"]


def test_options_and_the_directory_may_come_in_any_order(world: World) -> None:
    other = world.directory / "other"
    other.mkdir()
    for arguments in (["--task", "x", "--json", str(other)], [str(other), "--json", "--task", "x"]):
        world.model("TASK_COMPLETE")
        assert world.run(*arguments).status == 0
        assert world.events()[0]["workdir"] == str(other)


def test_a_finished_run_is_shown_again_by_replay(world: World) -> None:
    world.model("echo one", "TASK_COMPLETE")
    assert world.run("--task", "x").status == 0
    run = world.start("--replay", str(world.journals()[0]))
    shown = run.site().events(lambda event: event["type"] == "complete")
    assert [event.pop("stream id") for event in shown] == [str(event["id"]) for event in shown]
    assert shown == world.events()
    assert run.end(by=signal.SIGTERM).status == 143


def test_the_doctor_says_what_a_run_needs(world: World) -> None:
    world.model()
    done = world.run("--doctor")
    assert done.status == 0 and "FAILED" not in done.stdout, done
    for word in ("python", "tmux", "agent", "model", "session", "state", "dashboard"):
        assert re.search(rf"^{word}\s+ok", done.stdout, re.M)
    done = world.run("--doctor", OPENROUTER_API_KEY="", CLAUDE_CMD="", PATH=str(world.home))
    assert done.status == 1 and done.stderr == ""
    for line in (r"tmux\s+FAILED.*install", r"agent\s+FAILED.*claude.*install",
                 r"model\s+FAILED.*OPENROUTER_API_KEY"):
        assert re.search(f"^{line}", done.stdout, re.M), done.stdout


def test_the_examples_of_the_library_that_need_tmux_work(world: World) -> None:
    """In the docstrings they are marked to be skipped, for the unit tests."""
    code = ("import doctest, sys, orchestrator\n"
            "for name in ('Agent', 'Autopilot', 'Chat'):\n"
            "    value = getattr(orchestrator, name)\n"
            "    value.__doc__ = value.__doc__.replace('# doctest: +SKIP', '')\n"
            "    doctest.run_docstring_examples(value, vars(orchestrator), name=name)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=world.work, capture_output=True,
                          text=True, timeout=60, env={**world.env, "PYTHONPATH": str(TOOL.parent)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- Vendoring ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["prepend", "append", "importlib"])
def test_a_vendored_copy_runs_imports_and_passes_its_tests_with_import_mode(
        mode: str, world: World) -> None:
    tools = world.work / "tools"
    tools.mkdir()
    for file in (TOOL, TOOL.with_name("test_orchestrator.py")):
        shutil.copy(file, tools)
    if mode == "append":
        (tools / "__init__.py").touch()
        (tools / "README.md").write_text("# Our tools\n")
    selection = "readme or contents or docstrings or import or env"
    tests = ["-m", "pytest", "-q", f"--import-mode={mode}", "tools", "-k", selection]
    for arguments, expected in (
            (["tools/orchestrator.py", "--version"], r"orchestrator \d+\.\d+\.\d+\n"),
            (["-c", "from tools import orchestrator; print(orchestrator.Agent.__name__)"],
             r"Agent\n"),
            (tests, r"(?s).*\b[1-9]\d passed, [1-9]\d* skipped, \d+ deselected.*")):
        done = subprocess.run([sys.executable, "-B", *arguments], cwd=world.work, text=True,
                              capture_output=True, timeout=60)
        assert done.returncode == 0 and re.fullmatch(expected, done.stdout), done


# -- Pythons ------------------------------------------------------------------------------------

PYTHONS = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]
EACH_OTHER = pytest.mark.parametrize("python", [
    each for each in PYTHONS if each != "{}.{}".format(*sys.version_info)], indirect=True)


@pytest.fixture(params=PYTHONS)
def python(request: pytest.FixtureRequest) -> str:
    """The program itself, not a shim that needs its own home."""
    found = shutil.which(f"python{request.param}")
    asked = found and subprocess.run([found, "-c", "import sys; print(sys.executable)"],
                                     capture_output=True, text=True)
    if not asked or asked.returncode:
        pytest.skip(f"Python {request.param} is not installed")
    return asked.stdout.strip()


def test_the_manual_and_the_version_are_printed_by(python: str, world: World) -> None:
    done = world.run("--version", python=python)
    assert (done.status, done.stderr) == (0, "")
    assert re.fullmatch(r"orchestrator \d+\.\d+\.\d+\n", done.stdout)
    done = world.run("--help", python=python)
    assert (done.status, done.stderr) == (0, "")
    for word in ("--task TEXT", "--chat", "--resume", "--json", "--replay [FILE]", "--status",
                 "--demo", "--doctor", "CLAUDE_TMUX_SESSION", "DASHBOARD_OPEN", "Exit status"):
        assert word in done.stdout


def test_an_import_prints_nothing_and_starts_nothing_in(python: str, world: World) -> None:
    code = "import orchestrator, sys, threading; sys.exit(threading.active_count() - 1)"
    done = subprocess.run(
        [python, "-B", "-W", "error", "-c", code], cwd=world.work, capture_output=True, text=True,
        env={**world.env, "PYTHONPATH": str(TOOL.parent)}, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [*world.work.iterdir(), *world.home.iterdir(), *world.tmp.iterdir()] == []


@EACH_OTHER
def test_the_unit_tests_pass_with(python: str, world: World) -> None:
    ask = [python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if subprocess.run([*ask, "--version"], capture_output=True).returncode:
        pytest.skip(f"{python} has no pytest")
    done = subprocess.run([*ask, str(TOOL.with_name("test_orchestrator.py"))], env=world.env,
                          cwd=world.work, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]


@EACH_OTHER
def test_the_demo_completes_with(python: str, world: World) -> None:
    done = world.run("--demo", python=python)
    assert (done.status, done.stderr) == (0, "")
    assert_nothing_is_left(world)


# -- Dashboard ----------------------------------------------------------------------------------

def test_the_dashboard_serves_only_those_who_have_the_token(world: World) -> None:
    gate = Gate()
    world.model(gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    page = site.ask(site.entrance, cookie="")
    assert page.status == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    cookie = page.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert not [name for name in page.headers if name.lower().startswith("access-control")]
    assert site.ask("/").status == 200

    order = {"action": "pause"}
    for case, expected in [
            (site.ask("/", cookie=""), 403), (site.ask("/?token=wrong", cookie=""), 403),
            (site.ask("/events", cookie=""), 403), (site.ask("/control", order, cookie=""), 403),
            (site.ask("/", Host="evil.example"), 403), (site.ask("/", Host="192.0.2.77"), 403),
            (site.ask(site.entrance, Host=f"evil.example:{site.host.split(':')[1]}"), 403),
            (site.ask("/", Origin="http://evil.example"), 403),
            (site.ask("/control", order, Origin="http://evil.example"), 403),
            (site.ask("/control", order, Origin="null"), 403),
            (site.ask("/nothing"), 404), (site.ask("/nothing", order), 404),
            (site.ask("/control"), 405), (site.ask("/", order), 405),
            (site.ask("/control", {"action": "x"}), 400)]:
        assert case.status == expected, case
    gate.set()
    assert run.end().status == 0
    assert "paused" not in [event["state"] for event in world.events("state")]


def knock(site: Site, request: str) -> tuple[int, str]:
    """Send bytes of our own making; return the status and all of the answer."""
    host, port = site.host.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):      # refused before all was sent
            connection.sendall(request.encode().replace(b"\n", b"\r\n"))
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
    status = re.match(rb"HTTP/1.\d (\d+)", answer)
    return int(status[1]) if status else 0, answer.decode("utf-8", "replace")


def test_requests_of_odd_forms_are_refused_and_change_nothing(world: World) -> None:
    gate = Gate()
    world.model(gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    ours = f"Host: {site.host}\nCookie: {site.cookie}\n"
    post = f"POST /control HTTP/1.1\n{ours}Origin: http://{site.host}\n"
    kind, order = "Content-Type: application/json\n", '{"action": "stop"}'
    port = site.host.split(":")[1]
    for request, expected in [
            (f"GET / HTTP/1.1\n{ours}\n", 200), ("GET / HTTP/1.1\n\n", 403),
            (f"GET / HTTP/1.1\nHost: localhost:{port}\nCookie: {site.cookie}\n\n", 200),
            (f"GET / HTTP/1.1\nHost: [::1]:{port}\nCookie: {site.cookie}\n\n", 200),
            (f"GET / HTTP/1.1\nHost: 127.0.0.1.evil.example:{port}\nCookie: {site.cookie}\n\n",
             403),
            (f"GET /../../../../etc/passwd HTTP/1.1\n{ours}\n", 404),
            (f"GET //evil.example/events HTTP/1.1\n{ours}\n", 404),
            (f"GET /%2e%2e/etc/passwd HTTP/1.1\n{ours}\n", 404),
            (f"GET /{'x' * 100_000} HTTP/1.1\n{ours}\n", 414),
            (f"GET / HTTP/1.1\n{ours}X: {'x' * 1_000_000}\n\n", 431),
            (f"GET / HTTP/1.1\n{ours}" + "X: x\n" * 200 + "\n", 431),
            (f"PUT /control HTTP/1.1\n{ours}\n", 405), (f"DELETE / HTTP/1.1\n{ours}\n", 405),
            (f"PUT /control HTTP/1.1\nHost: {site.host}\n\n", 403),
            (f"{post}Content-Type: text/plain\nContent-Length: 18\n\n{order}", 415),
            (f"{post}Content-Length: 18\n\n{order}", 415),
            (f"{post}{kind}Transfer-Encoding: chunked\n\n12\n{order}\n0\n\n", 413),
            (f"{post}{kind}Content-Length: 70000\n\n{'x' * 70_000}", 413),
            (f"{post}{kind}Content-Length: -1\n\n{order}", 413),
            (f"{post}{kind}Content-Length: 200000\n\n{'[' * 200_000}", 413),
            (f"{post}{kind}Content-Length: 60000\n\n{'[' * 60_000}", 400),
            (f"{post}{kind}Content-Length: 2\n\n[]", 400)]:
        status, answer = knock(site, request)
        assert status == expected, (request[:300], answer[:300])
        assert "root:" not in answer and "Traceback" not in answer
    gate.set()
    assert run.end().status == 0 and world.events("state") == []


def test_a_thousand_silent_connections_leave_the_run_and_its_user_alone(world: World) -> None:
    gate = Gate()
    world.model("echo one", gate.reply("echo two"), "TASK_COMPLETE")
    run = world.start("--task", "x")
    site = run.site()
    host, port = site.host.split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            with contextlib.suppress(OSError):      # closed as one too many
                stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        gate.set()
        assert run.end().status == 0
        assert world.taken("echo two")


def test_a_late_client_gets_the_whole_run_and_a_returning_one_what_it_missed(world: World) -> None:
    gate = Gate()
    world.model("echo one", "echo two", "echo three", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    whole = site.events(lambda event: event.get("iteration") == 4)
    so_far = world.events()
    assert [event.pop("stream id") for event in whole] == [str(event["id"]) for event in whole]
    assert whole == so_far and kinds(whole).count("iteration_end") == 3
    missed = site.events(lambda event: event["id"] == len(so_far), Last_Event_ID="5")
    assert [event["id"] for event in missed] == list(range(6, len(so_far) + 1))
    stream = site.each(Last_Event_ID=str(len(so_far) - 1))
    assert next(stream)["id"] == len(so_far)        # who comes once the gate is open may be late
    gate.set()
    rest = list(stream)
    assert run.end().status == 0
    assert [event["id"] for event in so_far + rest] == [event["id"] for event in world.events()]


def test_a_person_pauses_leaves_a_note_and_resumes(world: World) -> None:
    model = world.model("sleep 2", "echo two", "TASK_COMPLETE")
    run = world.start("--task", "x")
    site = run.site()
    assert world.taken("sleep 2"), run.stdout
    assert site.control("pause") == 204
    site.events(lambda event: event["type"] == "iteration_end")
    assert site.control("note", "mind the gap") == 204
    assert site.control("resume") == 204
    assert run.end().status == 0
    assert ["mind the gap" in model.last_message(number) for number in range(3)] == [
        False, True, False]
    happened = [event.get("state") or event["type"] for event in world.events()]
    assert happened[:8] == ["task_info", "iteration_start", "reply", "paused", "iteration_end",
                            "note", "resumed", "iteration_start"]


@pytest.mark.parametrize("action, text", [("note", "mind\nthe gap"), ("continue", "")])
def test_a_note_or_going_on_ends_a_wait_at_once(action: str, text: str, world: World) -> None:
    model = world.model("WAIT: 10m", "TASK_COMPLETE")
    run = world.start("--task", "x")
    site = run.site()
    site.events(lambda event: event.get("state") == "waiting")
    assert site.control("pause") == site.control("resume") == 204       # does not end it
    started = time.monotonic()
    assert site.control(action, text) == 204
    site.events(lambda event: event.get("iteration") == 2)
    assert time.monotonic() - started < 5
    assert run.end().status == 0
    assert "The user ended the wait." in model.last_message(1)
    assert ("mind\nthe gap" in model.last_message(1)) == bool(text)


def test_an_interrupt_presses_escape_in_the_agents_turn_and_delivers_the_note(world: World) -> None:
    model = world.model("work", "echo on", "TASK_COMPLETE")
    run = world.start("--task", "x")
    site = run.site()
    assert world.taken("work"), run.stdout
    assert site.control("interrupt", "leave\nthat") == 204
    assert world.taken("echo on"), run.stdout
    assert run.end().status == 0
    told = model.last_message(1)
    assert "Interrupted by the user" in told and "leave\nthat" in told, told
    assert "Escape was pressed" in told and "still working" not in told


def test_a_person_stops_the_run(world: World) -> None:
    world.model("sleep 60")
    run = world.start("--task", "x")
    site = run.site()
    assert world.taken("sleep 60"), run.stdout
    assert site.control("stop") == 204
    assert run.end(20).status == 130
    end = world.events()[-1]
    assert (end["outcome"], end["reason"]) == ("interrupted", "stopped from the dashboard")
    assert "Ended (interrupted: stopped from the dashboard)" in run.stdout


class TunnelServer(socketserver.ThreadingTCPServer):
    """A port that leads to another."""

    target: tuple[str, int]
    daemon_threads = True
    block_on_close = False


class Tunnel(socketserver.BaseRequestHandler):
    """One connection through another port, as `ssh -L`, `docker -p` and kubectl make it."""

    server: TunnelServer

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as there:
            ways = {self.request: there, there: self.request}
            while True:
                for end in select.select(list(ways), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ways[end].sendall(data)


@contextlib.contextmanager
def tunnel_to(host: str) -> Iterator[int]:
    """Forward a port of this machine to a host and port; yield it."""
    with TunnelServer(("127.0.0.1", 0), Tunnel) as server:
        name, port = host.split(":")
        server.target = name, int(port)
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_dashboard_works_through_a_tunnel_with_another_port(world: World) -> None:
    gate = Gate()
    world.model("echo one", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    url = run.site().url
    with tunnel_to(urllib.parse.urlsplit(url).netloc) as port:
        sites = [Site(re.sub(r"//[^/]*", f"//{name}:{port}", url))
                 for name in ("127.0.0.1", "localhost")]
        for site in sites:
            assert site.events(lambda event: event.get("iteration") == 2)
            assert site.control("pause") == site.control("resume") == 204
            assert site.ask("/control", {"action": "stop"},
                            Origin=f"http://{urllib.parse.urlsplit(url).netloc}").status == 403
        gate.set()
        assert run.end().status == 0


def test_the_address_outlives_a_resume(world: World) -> None:
    gate = Gate()
    world.model("echo one", gate.reply("TASK_COMPLETE"), gate.reply("TASK_COMPLETE"))
    first = world.start("--task", "x")
    site = first.site()
    (address,) = world.directory.glob("state/orchestrator/runs/*.dashboard")
    assert address.stat().st_mode & 0o777 == 0o600 and site.url in address.read_text()
    assert site.entrance.split("=")[1] not in world.journals()[0].read_text()
    seen = site.events(lambda event: event.get("iteration") == 2)
    assert first.end(by=signal.SIGKILL).status == -signal.SIGKILL
    second = world.start("--resume")
    assert second.site().url == site.url
    missed = site.events(lambda event: event.get("state") == "resumed",
                         Last_Event_ID=str(seen[-1]["id"]))
    assert missed[0]["id"] == seen[-1]["id"] + 1        # the page that was open goes on
    gate.set()
    assert second.end().status == 0


def test_a_port_that_is_taken_costs_the_dashboard_only(world: World) -> None:
    model = world.model("TASK_COMPLETE")
    done = world.run("--task", "x", DASHBOARD_PORT=str(model.port))
    assert done.status == 0 and "Dashboard:" not in done.stdout
    assert_one_complaint(done, "dashboard", str(model.port))


def test_no_dashboard_is_served_where_it_is_not_wanted(world: World) -> None:
    world.model("TASK_COMPLETE")
    done = world.run("--task", "x", DASHBOARD_ENABLED="off")
    assert done.status == 0 and "Dashboard" not in done.stdout


# -- The page in a browser ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """With nothing open: a page whose server is gone asks for it again and again."""
    chromium.open("about:blank")
    chromium.console.clear()
    return chromium


def start_nginx(world: World, stack: contextlib.ExitStack, location: str) -> int:
    """Publish something with TLS at /run/ of https://localhost; return the port."""
    if not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("nginx is not installed (apt-get install nginx)")
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    port, directory = free_port(), world.directory / "nginx"
    (directory / "temporary").mkdir(parents=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-keyout", directory / "key.pem", "-out", directory / "certificate.pem"],
        check=True, capture_output=True, timeout=60)
    places = "".join(f"{kind}_temp_path temporary/{kind}; " for kind in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (directory / "nginx.conf").write_text(f"""daemon off; master_process off; pid nginx.pid;
        events {{}}
        http {{
            access_log off; {places}
            server {{
                listen 127.0.0.1:{port} ssl;
                ssl_certificate certificate.pem; ssl_certificate_key key.pem;
                location /run/ {{ {location} }}
            }}
        }}""")
    nginx = subprocess.Popen(["nginx", "-e", "error.log", "-p", directory, "-c", "nginx.conf"],
                             env={"PATH": f"{os.environ['PATH']}:/usr/sbin"},
                             stdin=subprocess.DEVNULL)
    stack.callback(nginx.wait)
    stack.callback(nginx.kill)
    return port


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("location", [
    "proxy_pass http://127.0.0.1:PORT/;",
    "proxy_pass http://127.0.0.1:PORT; proxy_set_header Host $http_host;"])
def test_a_browser_uses_the_dashboard_behind_nginx_with_tls_and_a_path(
        location: str, world: World, browser: Browser) -> None:
    gate, port = Gate(), free_port()
    world.model("echo one", gate.reply("TASK_COMPLETE"))
    with contextlib.ExitStack() as stack:
        nginx_port = start_nginx(world, stack, location.replace("PORT", str(port)))
        public = f"https://localhost:{nginx_port}/run/"
        run = world.start("--task", "published", DASHBOARD_PORT=str(port), DASHBOARD_URL=public)
        assert poll(lambda: f"Dashboard: {public}?token=" in run.stdout, 30), run.stdout
        token = found(r"token=(\S+)", run.stdout)[1]
        browser.ignore_certificates()
        browser.open(public)
        assert poll(lambda: "token" in browser.evaluate("document.body.innerText"), 15)
        browser.type(token)         # the field has the focus
        browser.press("Enter")
        assert poll(lambda: "published" in browser.evaluate("document.title"), 15)
        assert browser.evaluate("location.href") == public
        answer = """fetch("control", {method: "POST", body: '{"action": "pause"}',
            headers: {"Content-Type": "application/json"}}).then(answer => answer.status)"""
        assert browser.evaluate(answer) == 204
        assert poll(lambda: "paused" in [event["state"] for event in world.events("state")], 15)
        assert browser.evaluate(answer.replace("pause", "resume")) == 204
        journal = "fetch('journal').then(answer => answer.text())"
        assert "published" in browser.evaluate(journal)
        gate.set()
        assert poll(lambda: "complete" in browser.evaluate("document.title"), 15)
        assert run.end().status == 0
        browser.open("about:blank")
    assert [line for line in browser.console if "403" not in line] == []


def visible(browser: Browser) -> str:
    """Return the text of the page, with all that is folded away unfolded."""
    browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    return str(browser.evaluate("document.body.innerText"))


def sees(browser: Browser, *words: str) -> bool:
    """Whether all these words are on the page, within some seconds."""
    return bool(poll(lambda: all(word in visible(browser) for word in words), 15))


def fits(browser: Browser) -> bool:
    """Whether the page needs no scrolling to the side."""
    return bool(browser.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_sees_the_whole_run_however_late_it_comes(
        width: int, world: World, browser: Browser) -> None:
    gates = Gate(), Gate()
    world.model(gates[0].reply("MEMORY_SAVE: the sky is blue\necho uno"), "echo due", "echo tre",
                gates[1].reply("TASK_COMPLETE"))
    run = world.start("--task", "count in Italian", MAX_ITERATIONS="8")
    site = run.site()
    browser.size(width, 900)
    browser.open(site.url)
    assert sees(browser, "count in Italian", "anthropic/claude-opus-4.6"), visible(browser)
    gates[0].set()
    whole = ["count in Italian", "echo uno", "\nuno", "echo due", "\ndue", "echo tre", "\ntre",
             "the sky is blue"]
    assert sees(browser, *whole), visible(browser)
    assert fits(browser)
    browser.open("about:blank")
    browser.open(site.url)
    assert sees(browser, *whole), visible(browser)
    assert fits(browser)
    gates[1].set()
    assert run.end().status == 0
    assert sees(browser, "omplete"), visible(browser)
    assert browser.console == []


def test_hostile_text_is_shown_as_text(world: World, browser: Browser) -> None:
    image = "<img src=x onerror=\"window.broken = 1\">"
    script = "</pre></script><script>window.broken = 1</script><b>"
    gate = Gate()
    world.model(f"MEMORY_SAVE: fact {image}\necho reply {image} {script}",
                f"echo \x1b[31m{script}", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", f"task {image} {script}")
    site = run.site()
    browser.size(1280, 900)
    browser.open(site.url)
    assert sees(browser, f"task {image} {script}", f"reply {image} {script}", f"fact {image}"), \
        visible(browser)
    assert browser.evaluate("document.querySelectorAll('[onerror], b > *').length") == 0
    assert site.control("note", f"note {image}") == 204
    assert sees(browser, f"note {image}"), visible(browser)
    gate.set()
    assert run.end().status == 0
    assert sees(browser, "omplete"), visible(browser)
    assert browser.evaluate("window.broken") is None
    assert browser.console == []


def shows(browser: Browser, headline: str) -> str:
    """Return the icon once the page and its title say this of the run, "" if they never do."""
    look = ("[document.getElementById('status').innerText, document.title.split(' · ')[0],"
            "document.getElementById('icon').href]")
    seen = poll(lambda: (found := browser.evaluate(look))[:2] == [headline] * 2 and found, 15)
    return seen[2] if seen else ""


def iterations(browser: Browser) -> list[str]:
    """Return the texts of the iterations, oldest first; also of those that are out of view."""
    visible(browser)
    return list[str](browser.evaluate(
        "[...document.querySelectorAll('.iteration')].reverse().map(each => [...each"
        ".querySelectorAll('b, .excerpt, .flag, .figure, .label, pre')].map("
        "part => part.textContent).join('\\n'))"))


def figures(browser: Browser) -> list[str]:
    """Return the totals: iterations, cost and tokens."""
    return list[str](browser.evaluate("['iterations-done', 'cost', 'tokens'].map("
                                      "id => document.getElementById(id).innerText)"))


def tab_to(browser: Browser, selector: str) -> None:
    """Press Tab until this has the focus."""
    for _ in range(40):
        browser.press("Tab")
        if browser.evaluate(f"document.activeElement.matches({selector!r})"):
            return
    pytest.fail(f"no Tab leads to {selector}")


class Cable:
    """The way from a port of 127.0.0.1 to the same port of 127.0.0.2, which can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.mend()

    def mend(self) -> None:
        """Let connections through from now on."""
        self._ends = [socket.create_server(("127.0.0.1", self._port))]
        threading.Thread(target=self._accept, args=(self._ends,), daemon=True).start()

    def cut(self) -> None:
        """End all connections; new ones are refused."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends[0].close()

    def _accept(self, ends: list[socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while True:
                pair = ends[0].accept()[0], socket.create_connection(("127.0.0.2", self._port))
                ends += pair
                for way in (pair, pair[::-1]):
                    threading.Thread(target=self._carry, args=way, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, goal: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                goal.sendall(data)
            goal.shutdown(socket.SHUT_RDWR)


def written(world: World, *events: Event) -> Path:
    """Write a journal by hand; return its file."""
    path = world.directory / "written.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, event in enumerate(events, 1):
            at = f"2026-01-31T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000Z"
            file.write(json.dumps({"id": number, "time": at, **event}) + "\n")
    return path


def open_recording(browser: Browser, world: World, *events: Event) -> Path:
    """Show a journal that is written by hand; return its file, which is still followed."""
    path = written(world, *events)
    browser.open(world.start("--replay", str(path)).site().url)
    return path


def has_card(browser: Browser, *words: str) -> bool:
    """Whether these words are in the card of the end, within some seconds."""
    card = "document.getElementById('end').innerText"
    return bool(poll(lambda: all(word in browser.evaluate(card) for word in words), 15))


def test_a_person_sees_at_a_glance_what_the_run_does_and_in_which_colours(
        world: World, browser: Browser) -> None:
    (world.work / "colours").write_text(
        "\x1b[31mred\x1b[0m \x1b[1mbold\x1b[0m \x1b[7mturned\x1b[0m \x1b[38;5;208morange\x1b[0m "
        "\x1b[38;2;1;2;3mnight\x1b[0m plain\n日本\n", encoding="utf-8")
    gates = [Gate() for _ in range(4)]
    world.model([gates[0].reply("MEMORY_SAVE: a fact\ncat"),
                 gates[1].reply(" colours; until [ -e go ]; do sleep 0.1; done; echo gone")],
                "WAIT: 2m", "kill -9 $$", "TASK_COMPLETE", "touch proof",
                gates[2].reply("echo last"), gates[3].reply("TASK_COMPLETE"))
    run = world.start("--task", "look", MAX_ITERATIONS="9", MAX_COST="0.5", MAX_MINUTES="9",
                      CLAUDE_CMD="bash --norc", TURN_TIMEOUT="4",
                      VERIFY_CMD="test -e proof || { echo no proof yet; exit 9; }")
    site = run.site()
    browser.size(1280, 900)
    browser.open(site.url)
    assert shows(browser, "Model is thinking")
    gates[0].set()
    assert poll(lambda: "MEMORY_SAVE: a fact\ncat" in "".join(iterations(browser)), 15)
    assert shows(browser, "Model is thinking") and not world.events("reply")
    gates[1].set()
    assert shows(browser, "Agent is working")
    assert poll(lambda: re.fullmatch(r"[1-9][\d.]* s", browser.evaluate(
        "document.getElementById('elapsed').innerText")), 5)
    assert shows(browser, "Waiting")
    assert sees(browser, "up to 120 s", "日本")
    style = ("(word => { const found = [...document.querySelectorAll('#screen span')].find(each =>"
             "each.innerText.trim().startsWith(word)), look = getComputedStyle(found); return [look"
             ".color, look.backgroundColor, look.fontWeight, found.offsetWidth]; })")
    red, bold, turned, orange, night, plain = (browser.evaluate(f"{style}({word!r})") for word in (
        "red", "bold", "turned", "orange", "night", "plain"))
    levels = list(map(int, re.findall(r"\d+", red[0])))
    assert levels[0] > 1.5 * max(levels[1:]), red
    assert int(bold[2]) >= 600 > int(plain[2]) and turned[1] == plain[0] != turned[0]
    assert (orange[0], night[0]) == ("rgb(255, 135, 0)", "rgb(1, 2, 3)")
    wide = "[...document.querySelectorAll('#screen .wide')].map(each => each.offsetWidth)"
    assert browser.evaluate(wide) == [pytest.approx(2 * night[3] / len("night"), abs=1)] * 2
    (world.work / "go").touch()
    assert poll(lambda: len(world.events("iteration_start")) == 6, 60), run.stdout
    browser.evaluate("document.getElementById('pause').click()")
    gates[2].set()
    assert poll(lambda: len(world.events("iteration_end")) == 6, 30), run.stdout
    paused = shows(browser, "Paused")
    browser.evaluate("document.getElementById('pause').click()")
    thinking = shows(browser, "Model is thinking")
    gates[3].set()
    assert run.end().status == 0
    assert len({"", thinking, paused, shows(browser, "Task complete")}) == 4, visible(browser)
    marks = ["remembered\na fact", "gone", "restarted", "no proof yet\nstatus 9", "touch proof",
             "\nlast", "status 0"]
    assert poll(lambda: all(mark in row for mark, row in zip(marks, iterations(browser))), 15), \
        iterations(browser)
    assert len(iterations(browser)) == len(marks)
    bars = browser.evaluate("[...document.querySelectorAll('#figures progress')].map("
                            "each => each.checkVisibility() && [each.value, each.max])")
    minutes = world.events("complete")[0]["duration_ms"] / 60000
    assert bars == [[7, 9], [pytest.approx(minutes, abs=0.05), 9], [pytest.approx(0.07), 0.5]]
    assert browser.console == []


def test_a_page_that_was_cut_off_shows_what_it_missed_once(world: World, browser: Browser) -> None:
    gates = Gate(), Gate(), Gate()
    world.model("echo one", gates[0].reply("MEMORY_SAVE: a fact\necho two"), "echo three",
                gates[1].reply("echo four"), gates[2].reply("TASK_COMPLETE"))
    run = world.start("--task", "count", MAX_COST="1", DASHBOARD_HOST="127.0.0.2")
    url = run.site().url.replace("127.0.0.2", "127.0.0.1")
    cable = Cable(urllib.parse.urlsplit(url).port or 0)
    browser.open(url)
    assert sees(browser, "\none"), visible(browser)
    cable.cut()
    assert shows(browser, "Connection lost"), visible(browser)
    spent = browser.evaluate("document.getElementById('time').innerText")
    gates[0].set()
    assert poll(lambda: len(world.events("iteration_start")) == 4, 30), run.stdout
    time.sleep(1.5)         # the page counts seconds
    assert browser.evaluate("document.getElementById('time').innerText") == spent
    assert "two" not in visible(browser)
    cable.mend()
    assert shows(browser, "Model is thinking"), visible(browser)
    assert sees(browser, "\ntwo", "\nthree"), visible(browser)
    gates[1].set()
    assert sees(browser, "\nfour"), visible(browser)
    assert poll(lambda: len(iterations(browser)) == 5, 15)
    shown, facts = iterations(browser), "document.getElementById('facts').innerText"
    totals, used = figures(browser), sum(e["tokens"]["total"] for e in world.events("reply"))
    assert totals[:2] == ["5", "$0.0400"] and browser.evaluate(facts) == "a fact"
    assert float(totals[2].rstrip("k")) == pytest.approx(used / 1000, rel=0.01)
    browser.open(url)
    assert poll(lambda: iterations(browser) == shown, 15), (iterations(browser), shown)
    assert figures(browser) == totals and browser.evaluate(facts) == "a fact"
    gates[2].set()
    assert run.end().status == 0
    assert shows(browser, "Task complete")
    assert [line for line in browser.console if "net::ERR_" not in line] == []


def test_a_replay_shows_what_the_live_page_showed_even_of_a_torn_journal(
        world: World, browser: Browser) -> None:
    gate = Gate()
    world.model("echo one", "MEMORY_SAVE: a fact\necho two", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "count")
    browser.open(run.site().url)
    assert sees(browser, "\none", "\ntwo"), visible(browser)
    assert poll(lambda: len(iterations(browser)) == 3, 15)
    live = iterations(browser)
    gate.set()
    assert run.end().status == 0
    whole = world.journals()[0].read_bytes()
    torn = world.directory / "torn.jsonl"
    torn.write_bytes(whole[:whole.index(b'"type": "complete"')])
    controls = "document.getElementById('controls').checkVisibility()"
    for path, headline in [(world.journals()[0], "Task complete"), (torn, "Unfinished")]:
        run_replay = world.start("--replay", str(path))
        site = run_replay.site()
        browser.open(site.url)
        assert shows(browser, headline), visible(browser)
        assert poll(lambda: iterations(browser)[:2] == live[:2], 15), (iterations(browser), live)
        assert len(iterations(browser)) == 3
        assert not browser.evaluate(controls) and site.control("pause") == 409
        assert sees(browser, "Recording of") and "attach" not in visible(browser)
        assert browser.console == []
        browser.open("about:blank")
        assert run_replay.end(by=signal.SIGTERM).status == 143


def test_a_person_steps_in_with_the_keyboard_alone(world: World, browser: Browser) -> None:
    gates = Gate(), Gate()
    model = world.model(gates[0].reply("echo one"), gates[1].reply("echo two"))
    run = world.start("--task", "x")
    site = run.site()
    browser.open(site.url)
    assert shows(browser, "Model is thinking"), visible(browser)
    tab_to(browser, "#pause")
    browser.press("Enter")
    assert sees(browser, "Resume"), visible(browser)
    tab_to(browser, "#note")
    browser.type("mind")
    browser.press("Enter", shift=True)
    browser.type("the gäp")
    browser.open(site.url)
    assert browser.evaluate("document.getElementById('note').value") == "mind\nthe gäp"
    assert shows(browser, "Model is thinking"), visible(browser)
    tab_to(browser, "#note")
    browser.press("Enter")
    assert sees(browser, "Noted", "mind\nthe gäp"), visible(browser)
    assert browser.evaluate("document.getElementById('note').value") == ""
    gates[0].set()
    assert sees(browser, "\none"), visible(browser)
    assert shows(browser, "Paused") and len(model.requests) == 1
    tab_to(browser, "#pause")
    browser.press("Enter")
    assert shows(browser, "Model is thinking"), visible(browser)
    assert poll(lambda: "mind\nthe gäp" in model.last_message(1), 15)
    is_asked = "document.getElementById('stop-now').checkVisibility()"
    for key in ("Escape", "Enter"):
        tab_to(browser, "#stop")
        browser.press("Enter")
        assert poll(lambda: browser.evaluate(is_asked), 5)
        tab_to(browser, "#stop-now")
        browser.press(key)
        assert poll(lambda: not browser.evaluate(is_asked), 5)
    assert run.end(20).status == 130
    assert shows(browser, "Interrupted"), visible(browser)
    assert has_card(browser, "stopped from the dashboard", "--resume"), visible(browser)
    assert [e.get("state", e["type"]) for e in world.events("state", "note", "complete")] == [
        "paused", "note", "resumed", "complete"]
    assert browser.console == []


def test_hostile_text_in_every_field_of_a_journal_is_text_and_the_page_stays_quick(
        world: World, browser: Browser) -> None:
    evil = "<img src=x onerror=window.hit=1></script><script>window.hit=1</script>"
    used = {"tokens": {"prompt": evil, "completion": evil}, "cost": evil, "duration_ms": evil}
    bomb = "\x1b[7mx\x1b[38;5;9my\x1b[0m日" * 12000
    path = written(
        world, {"type": "task_info", "max_iter": evil, "max_cost": evil, "max_minutes": evil, **{
            name: f"{name} {evil}" for name in ("task", "model", "agent", "workdir", "attach")},
            "memories": [f"memory {evil}"]},
        {"type": "iteration_start", "iteration": 1, "max_iter": evil},
        {"type": "reply", "text": f"reply {evil}", **used}, {"type": evil, "text": evil},
        {"type": "memory", "saved": [f"fact {evil}"], "total": evil},
        {"type": "error", "error": f"error {evil}", "retry_in": evil},
        {"type": "recovery", "what": f"what {evil}", "resumed": evil},
        {"type": "verify", "command": f"check {evil}", "status": evil, "output": f"out {evil}"},
        {"type": "history", "summarised": evil, "summary": f"summary {evil}", **used},
        {"type": "note", "text": f"note {evil}", "source": evil},
        {"type": "state", "state": evil, "reason": evil},
        {"type": "screen", "text": f"screen {evil}\n{bomb}"},
        {"type": "iteration_end", "orchestrator": f"typed {evil}", "error": f"trouble {evil}",
         "agent_output": f"output {evil}\n\x1b[31m\0" + "x" * 10_000_000, **used},
        {"type": "complete", "outcome": evil, "reason": f"reason {evil}", **used})
    run_replay = world.start("--replay", str(path))
    browser.size(1280, 900)
    browser.open(run_replay.site().url)
    names = ["task", "model", "agent", "workdir", "memory", "reply", "fact", "error",
             "what", "check", "out", "summary", "note", "screen", "typed", "trouble", "output",
             "reason"]
    assert sees(browser, *(f"{name} {evil}" for name in names)), visible(browser)[:9000]
    began = time.monotonic()
    assert "more characters" in visible(browser) and time.monotonic() - began < 5
    assert browser.evaluate("[typeof hit, document.images.length, document.scripts.length]") == [
        "undefined", 1, 1]
    assert fits(browser)
    assert browser.console == []


OLD_END: Event = {"type": "complete", "outcome": "failed", "iterations": 1, "cost": 0.0,
                  "reason": "the model gave up: no network\n\nA person must help.",
                  "tokens": {"prompt": 5, "completion": 5, "total": 10}, "duration_ms": 5000}
NEW_END: Event = {**OLD_END, "outcome": "complete", "reason": "", "cost": None, "restarts": 3,
                  "errors": 4, "files_changed": 7, "last_words": "14 passed",
                  "unproved": ["No file was changed."]}


@pytest.mark.parametrize("end, headline, words, absent", [
    (NEW_END, "Task complete", ["All is proved.", "passed, status 0: make check", "restarts\n3",
                                "errors\n4", "files changed\n7", "14 passed",
                                "No file was changed."], "--resume"),
    (OLD_END, "Failed", ["the model gave up: no network\n\nA person must help.", "errors\n1"],
     "--resume"),
    (None, "Unfinished", ["no last event", "'/src/it'\"'\"'s' --resume"], "last words")])
def test_the_end_comes_first(end: Event | None, headline: str, words: list[str], absent: str,
                             world: World, browser: Browser) -> None:
    browser.size(1280, 800)
    path = open_recording(
        browser, world, {"type": "task_info", "task": "do it", "workdir": "/src/it's",
                         "attach": "tmux attach"},
        {"type": "iteration_start", "iteration": 1}, {"type": "error", "error": "oh"},
        {"type": "state", "state": "resumed", "reason": "x", "time": "2026-01-31T05:00:00.000Z"},
        {"type": "reply", "text": "All is proved.\n\nTASK_COMPLETE", "cost": None,
         "tokens": {"total": 10}, "time": "2026-01-31T05:00:02.000Z"},
        {"type": "verify", "command": "make check", "status": 0, "output": "",
         "time": "2026-01-31T05:00:02.000Z"},
        {"type": "screen", "text": "the last screen"}, *([end] if end else []))
    assert shows(browser, headline), visible(browser)
    assert has_card(browser, *words, f"--replay '{path}'", str(path)), visible(browser)
    assert absent not in browser.evaluate("document.getElementById('end').innerText")
    order = [browser.evaluate(f"document.getElementById('{name}').getBoundingClientRect().top")
             for name in ("status", "end", "figures", "screen", "iterations")]
    assert order == sorted(order) and order[1] < 200
    time_and_cost = "['time', 'cost'].map(id => document.getElementById(id).innerText)"
    assert browser.evaluate(time_and_cost) == ["5.0 s" if end else "4.0 s", "not reported"]
    assert sees(browser, "Recording of Jan 31, 2026") and "attach" not in visible(browser)
    assert browser.console == []


BOX = "(name => { const box = document.querySelector(name).getBoundingClientRect(); return "


def test_all_that_matters_of_a_run_is_above_the_fold(world: World, browser: Browser) -> None:
    (world.work / "picture").write_text("\n".join(
        f"line {number} {'x' * 180}" for number in range(60)), encoding="utf-8")
    gate = Gate()
    world.model("cat picture", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x", CLAUDE_CMD="bash --norc", MAX_COST="1", MAX_MINUTES="9")
    browser.size(1440, 900)
    browser.open(run.site().url)
    assert shows(browser, "Model is thinking") and sees(browser, "line 59"), visible(browser)
    size = "getComputedStyle(document.getElementById('screen')).fontSize"
    bottoms = f"['#status', '#figures', '#attach', '#screen'].map({BOX} box.bottom; }}))"
    for width, height in ((1440, 900), (1280, 800), (1920, 1080)):
        browser.size(width, height)
        is_above = f"Math.max(...{bottoms}) <= {height}"
        assert poll(functools.partial(browser.evaluate, is_above), 5)
        assert fits(browser)
        assert float(browser.evaluate(size).rstrip("px")) >= 9
    browser.evaluate("document.getElementById('size').click()")
    assert browser.evaluate(size) == "14px"
    gate.set()
    assert run.end().status == 0


def test_the_terminal_shows_styles_and_cursor_and_holds_still_for_a_selection(
        world: World, browser: Browser) -> None:
    lines = ["\x1b[8mhidden\x1b[0m \x1b[4;9mboth\x1b[0m \x1b[40mblack\x1b[0m",
             *(f"line {number}" for number in range(2, 10)), "the last line"]
    path = open_recording(browser, world, {"type": "task_info", "task": "x", "max_iter": 4},
                          {"type": "screen", "text": "\n".join(lines), "columns": 80, "rows": 10,
                           "cursor": [9, 4]})
    assert sees(browser, "the last line"), visible(browser)
    style = ("(word => { const found = [...document.querySelectorAll('#screen span')].find(each =>"
             "each.textContent.startsWith(word)), look = getComputedStyle(found); return [look"
             ".color, look.backgroundColor, look.textDecorationLine]; })")
    hidden, both, black = (browser.evaluate(f"{style}({word!r})") for word in (
        "hidden", "both", "black"))
    assert hidden[0] == browser.evaluate(
        "getComputedStyle(document.getElementById('screen-box')).backgroundColor")
    assert both[2] == "underline line-through" and black[1] == "rgb(0, 0, 0)"
    top, bottom = browser.evaluate(f"{BOX} [box.top, box.bottom]; }})('#screen')")
    cursor = browser.evaluate(f"{BOX} (box.top + box.bottom) / 2; }})('.cursor')")
    assert (cursor - top) / (bottom - top) == pytest.approx(0.94, abs=0.03)
    browser.evaluate("getSelection().selectAllChildren(document.getElementById('screen'))")
    with path.open("a") as file:
        file.write(json.dumps({"id": 3, "type": "screen", "text": "a new picture"}) + "\n")
    assert poll(lambda: "Held" in browser.evaluate("document.getElementById('held').innerText"), 15)
    assert "the last line" in visible(browser)
    browser.press("Escape")
    assert sees(browser, "a new picture") and "Held" not in visible(browser)
    assert browser.console == []


def test_waits_count_down_and_end_at_once_under_a_wrong_clock(
        world: World, browser: Browser) -> None:
    gate = Gate()
    model = world.model("WAIT: 10m", gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site, elapsed = run.site(), "document.getElementById('elapsed').innerText"
    wrong = "{ const now = Date.now; Date.now = () => now() + 9000000; }"
    with browser.before_each_page(wrong):
        browser.open(site.url)
    assert shows(browser, "Waiting"), visible(browser)
    assert poll(lambda: re.match(r"(9:5\d|10:00) left, until \d", browser.evaluate(elapsed)), 15)
    assert re.fullmatch(r"[\d.]+ s", browser.evaluate("document.getElementById('time').innerText"))
    browser.evaluate("document.getElementById('pause').click()")
    assert shows(browser, "Paused")
    browser.evaluate("document.getElementById('pause').click()")
    assert shows(browser, "Waiting")
    browser.evaluate("document.getElementById('continue').click()")
    assert shows(browser, "Model is thinking") and len(model.requests) == 2
    gate.set()
    assert run.end().status == 0
    assert shows(browser, "Task complete")


def test_any_text_is_found_filtered_and_linked(world: World, browser: Browser) -> None:
    events: list[Event] = [{"type": "task_info", "task": "x"}]
    for number in range(1001, 1031):
        events += [{"type": "iteration_start", "iteration": number},
                   {"type": "reply", "text": f"step {number}"},
                   {"type": "iteration_end", "orchestrator": "", "agent_output": "fine\n" * 40}]
    events[41]["text"] += " (a NEEDLE)"
    events[50:50] = [{"type": "error", "error": "oh", "iteration": 1016},
                     {"type": "note", "text": "hm", "source": "dashboard", "iteration": 1017},
                     {"type": "verify", "status": 1, "iteration": 1018}]
    browser.size(1024, 768)
    path = open_recording(browser, world, *events)
    rows = ("[...document.querySelectorAll('.iteration')].filter(row => row.checkVisibility())"
            ".map(row => parseInt(row.querySelector('b').textContent))")
    assert poll(lambda: browser.evaluate(rows) == list(range(1030, 1000, -1)), 15)
    widths = "(({scrollWidth, clientWidth}) => scrollWidth <= clientWidth)"
    assert browser.evaluate(f"{widths}(document.querySelector('.iteration b'))")

    def choose(name: str, value: str) -> list[int]:
        """Search or filter; return the rows that are left."""
        before = list[int](browser.evaluate(rows))
        browser.evaluate(f"{{ const field = document.getElementById({name!r});"
                         f"field.value = {value!r}; (field.oninput ?? field.onchange)(); }}")
        assert poll(lambda: browser.evaluate(rows) != before, 5)
        return list[int](browser.evaluate(rows))

    assert choose("search", "a needle)") == [1014]
    assert browser.evaluate("document.querySelector('.excerpt').innerText") and sees(
        browser, "1 of 30", "step 1014 (a NEEDLE)")
    assert browser.evaluate("document.querySelector('mark').innerText") == "a NEEDLE)"
    choose("search", "")
    assert [choose("filter", kind) for kind in ("error", "note", "check failed")] == [
        [1016], [1017], [1018]]
    choose("filter", "")
    browser.evaluate("document.getElementById('expand').click()")
    opened = "document.querySelectorAll('.iteration[open] pre').length"
    assert poll(lambda: browser.evaluate(opened) > 60, 5)
    assert browser.evaluate("fetch(document.getElementById('download').href).then("
                            "answer => answer.text())") == path.read_text(encoding="utf-8")
    address = browser.evaluate("location.origin")
    browser.open("about:blank")
    browser.open(f"{address}/#1003")
    in_view = ("(row => row?.open && row.querySelector('b').textContent === '1003' && row."
               "getBoundingClientRect().top < innerHeight / 2)(document.querySelectorAll("
               "'.iteration')[27])")
    assert poll(lambda: browser.evaluate(in_view), 5)
    time.sleep(0.5)             # and it stays there
    assert browser.evaluate(in_view)
    assert browser.console == []


def test_ten_tabs_of_a_run_load_and_steer_and_catch_up(world: World, browser: Browser) -> None:
    gates = Gate(), Gate()
    world.model(gates[0].reply("echo one"), gates[1].reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    with browser.tabs(10) as show:
        for number in range(10):
            show(number)
            browser.open(site.url)
            assert shows(browser, "Model is thinking"), visible(browser)
        gates[0].set()
        for number in range(10):
            show(number)
            assert sees(browser, "\none"), visible(browser)
            browser.evaluate(f"document.getElementById('note').value = 'note of {number}'")
            browser.evaluate("document.getElementById('note-form').requestSubmit()")
            assert sees(browser, "Noted", f"note of {number}"), visible(browser)
        gates[1].set()
        assert run.end().status == 0
        assert shows(browser, "Task complete")
    assert [event["text"] for event in world.events("note")] == [
        f"note of {number}" for number in range(10)]


def axe_core() -> str:
    """Return the source of axe-core, which finds what people with disabilities can't use."""
    for directory in os.environ.get("NODE_PATH", "").split(os.pathsep):
        path = Path(directory, "axe-core", "axe.min.js")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    pytest.skip("axe-core is not in NODE_PATH (npm install --prefix DIR axe-core; "
                "export NODE_PATH=DIR/node_modules)")


def test_axe_finds_nothing_in_any_state(world: World, browser: Browser) -> None:
    source, gate = axe_core(), Gate()
    world.model("MEMORY_SAVE: a fact\necho one; seq 90", "WAIT: 10m",
                gate.reply("TASK_FAILED: it can't be done"))
    run = world.start("--task", "x", MAX_ITERATIONS="9", DASHBOARD_HOST="127.0.0.2")
    url = run.site().url.replace("127.0.0.2", "127.0.0.1")
    cable = Cable(urllib.parse.urlsplit(url).port or 0)
    rules = "{'target-size': {enabled: true}}"
    check = (f"axe.run({{rules: {rules}}}).then(found => found.violations.map(each =>"
             "[each.id, ...each.nodes.map(node => node.html)]))")

    def findings(state: str) -> list[object]:
        """Return what axe finds in a state, narrow and wide, light and dark."""
        assert shows(browser, state), visible(browser)
        visible(browser)            # with everything unfolded
        found: list[object] = []
        for width, scheme in [(390, "light"), (640, "dark"), (1440, "light"), (1440, "dark")]:
            browser.size(width, 900)
            browser.colours(scheme)
            found += [(state, width, scheme, each) for each in browser.evaluate(check)]
            assert fits(browser)
        return found

    browser.open(url)
    browser.evaluate(f"{source};0")
    assert findings("Waiting") == []
    browser.evaluate("document.getElementById('pause').click()")
    assert findings("Paused") == []
    cable.cut()
    assert findings("Connection lost") == []
    cable.mend()
    browser.evaluate("document.getElementById('pause').click()")
    browser.evaluate("document.getElementById('continue').click()")
    assert findings("Model is thinking") == []
    gate.set()
    assert run.end().status == 4
    assert findings("Failed") == []
    browser.colours("light")


def shows_the_oldest(browser: Browser) -> bool:
    oldest = "[...document.querySelectorAll('.iteration')].pop().innerText"
    return "output of 1\n0123456 é" in browser.evaluate(oldest)


def test_a_run_of_2000_iterations_stays_light(world: World, browser: Browser) -> None:
    events: list[Event] = [{"type": "task_info", "task": "long", "max_iter": 4000}]
    for number in range(1, 2001):
        used = {"tokens": {"prompt": 900, "completion": 100, "total": 1000}, "cost": 0.01}
        events += [{"type": "iteration_start", "iteration": number},
                   {"type": "reply", "iteration": number, "text": f"echo {number}", **used},
                   {"type": "iteration_end", "iteration": number, "orchestrator": f"echo {number}",
                    "agent_output": f"output of {number}\n" + "0123456 é\n" * 1600}]
    run_replay = world.start("--replay", str(written(world, *events)))
    site, slowest, heaps = run_replay.site(), 0.0, []
    for _ in range(2):                  # at first, and loaded again
        browser.open(site.url)
        deadline, rows = time.monotonic() + 60, 0
        while rows < 2000 and time.monotonic() < deadline:
            asked = time.monotonic()
            rows = browser.evaluate("document.querySelectorAll('.iteration').length")
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.05)
        assert (rows, slowest < 10) == (2000, True), slowest
        assert figures(browser)[:3] == ["2000", "$20.00", "2M"]
        assert browser.evaluate("document.querySelectorAll('.iteration pre').length") < 20
        browser.evaluate("[...document.querySelectorAll('.iteration summary')].pop().click()")
        assert poll(functools.partial(shows_the_oldest, browser), 5)
        heaps.append(browser.evaluate("performance.memory.usedJSHeapSize"))
    assert max(heaps) < 250e6, heaps
    assert browser.console == []


# -- Benchmark ----------------------------------------------------------------------------------

class TimedModel(ScriptedModel):
    """A model that notes when it was asked, and when it had answered."""

    def __init__(self, replies: Sequence[Any]) -> None:
        super().__init__(replies)
        self.asked: list[float] = []
        self.answered: list[float] = []

    def answer(self, exchange: Exchange) -> None:
        asked = time.time()
        super().answer(exchange)
        if exchange.command == "POST":      # and no question for the models that it has
            self.asked.append(asked)
            self.answered.append(time.time())


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and of the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("agent", ["with a busy sign", "as Claude Code", "bash"])
def test_benchmark_of_the_tools_own_time_and_of_the_prompt(
        agent: str, world: World, asked_for: None) -> None:
    orders = [f"echo turn-{number}; seq 1 30" for number in range(25)]
    settings: dict[str, Any] = {}
    if agent == "bash":
        # Without a process of its own, which would be a busy sign.
        (world.home / ".bashrc").write_text(
            "trap '[ $idle ] && { idle=; echo $EPOCHREALTIME >> taken; }' DEBUG\n"
            "PROMPT_COMMAND='echo $EPOCHREALTIME >> finished; idle=1'\n")
        settings["CLAUDE_CMD"] = "bash"
    elif agent == "as Claude Code":
        settings = as_claude(world)
    with TimedModel([*orders, "TASK_COMPLETE"]) as model:
        world.env["OPENROUTER_BASE_URL"] = model.url
        assert world.start("--task", "x", **settings).end(200).status == 0
    if agent == "bash":
        taken, finished = ([float(at) for at in (world.work / name).read_text().split()]
                           for name in ("taken", "finished"))
        finished = finished[1:]
    else:
        entries = list(map(json.loads, (world.work / "agent.log").read_text().splitlines()))
        taken, finished = ([entry["at"] for entry in entries if name in entry]
                           for name in ("took", "done"))
    own = [took - answered + asked - done for answered, took, done, asked in
           zip(model.answered, taken, finished, model.asked[1:])]
    characters = [sum(len(text_of(message["content"])) for message in request.body["messages"])
                  for request in model.requests]
    print(f"\n{agent}: own time of {len(own)} turns: median {statistics.median(own):.2f} s, "
          f"worst {max(own):.2f} s; prompts: {sum(characters):,} characters (451,436 in the Go "
          f"tool), the last {characters[-1]:,}")


@REAL_AGENTS
def test_benchmark_of_answers_and_slash_commands_of_the_real(
        name: str, agent: str, world: World, agent_api: AgentApi, with_real_agents: None,
        asked_for: None) -> None:
    count, slash = 10, {"claude": "/context", "gpt": "/status"}[name]
    # In turn: the same command five times, with the same answer, would be a circle.
    orders = [order for number in range(count) for order in (f"SAY[answer {number}]", slash)]
    with TimedModel([*orders, "TASK_COMPLETE"]) as model:
        world.env["OPENROUTER_BASE_URL"] = model.url
        assert world.start("--task", "x", DEFAULT_MODEL=name).end(200).status == 0
    turns = list(zip(model.answered, model.asked[1:]))
    own = [asked - begun + ended - answered for (begun, ended), (asked, answered)
           in zip(turns[::2], agent_api.times)]
    whole = [ended - begun for begun, ended in turns[1::2]]
    for what, seconds in (("own time and the agent's", own), (slash, whole)):
        print(f"\n{agent}, {what}: {len(seconds)} turns, "
              f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s")


@pytest.mark.parametrize("where", ["where there is no terminal", "in a terminal"])
def test_benchmark_of_the_processor_time_of_a_minute(
        where: str, world: World, asked_for: None) -> None:
    gate, order = Gate(), " && ".join(f"echo {number} && sleep 0.5" for number in range(120))
    world.model(order, gate.reply("TASK_COMPLETE"))
    command = [sys.executable, TOOL, "--task", "x"]
    with Terminal(command, world.env, world.work) if where == "in a terminal" else \
            contextlib.nullcontext(world.start("--task", "x")) as run:
        assert world.taken(order)
        lock = next((world.directory / "state/orchestrator/locks").iterdir())
        pid = int(lock.read_text().split()[0])
        before = processor_seconds(pid)
        assert poll(lambda: world.log("done"), 90)
        used = processor_seconds(pid) - before
        gate.set()
        assert (run.exit_status() if isinstance(run, Terminal) else run.end().status) == 0
    print(f"\na turn of 60 s {where}, a new line on the screen twice a second: "
          f"{used:.2f} s of processor time, {used / 60:.1%} of a core")


def test_benchmark_of_the_start(world: World, asked_for: None) -> None:
    with TimedModel(["TASK_COMPLETE"]) as model:
        began = time.time()
        done = world.run("--task", "x", OPENROUTER_BASE_URL=model.url, AGENT_START="sleep 0.15")
        assert done.status == 0
    ready = json.loads((world.work / "agent.log").read_text())["at"]
    print(f"\nfrom start to the first call of the model: {model.asked[0] - began:.2f} s, "
          f"the agent was ready after {ready - began:.2f} s")


def test_benchmark_of_a_hundred_clients(world: World, asked_for: None) -> None:
    """Each notes when each event reached it; five more open the stream and never read."""
    gate, notes = Gate(), 50
    world.model(gate.reply("TASK_COMPLETE"))
    run = world.start("--task", "x")
    site = run.site()
    delays: list[float] = []
    told: list[list[int]] = []

    def watch() -> None:
        ids = []
        for event in site.each():
            ids.append(event["id"])
            if event["type"] == "note" and event["source"] == "dashboard":
                sent = datetime.datetime.fromisoformat(event["time"].replace("Z", "+00:00"))
                delays.append(time.time() - sent.timestamp())
        told.append(ids)

    with contextlib.ExitStack() as stack:
        for _ in range(5):
            host, port = site.host.split(":")
            deaf = stack.enter_context(socket.create_connection((host, int(port))))
            deaf.sendall(f"GET /events HTTP/1.1\r\nHost: {site.host}\r\n"
                         f"Cookie: {site.cookie}\r\n\r\n".encode())
        clients = [threading.Thread(target=watch) for _ in range(100)]
        for client in clients:
            client.start()
        for number in range(notes):
            assert site.control("note", f"note {number} {'x' * 10_000}") == 204
        gate.set()
        assert run.end().status == 0
        for client in clients:
            client.join(30)
    everything = [event["id"] for event in world.events()]
    print(f"\n{len(clients)} clients and 5 that never read, {notes} events of 10 KB: "
          f"{sum(ids == everything for ids in told)} got all in order; delay median "
          f"{1000 * statistics.median(delays):.0f} ms, worst {1000 * max(delays):.0f} ms")
    assert told == [everything] * len(clients)


def test_benchmark_of_a_replay_of_5000_events(
        world: World, browser: Browser, asked_for: None) -> None:
    events: list[Event] = [{"type": "task_info", "task": "long"}]
    for number in range(1, 1667):
        events += [{"type": "iteration_start", "iteration": number},
                   {"type": "reply", "iteration": number, "text": "x" * 200,
                    "tokens": {"prompt": 900, "completion": 100, "total": 1000}, "cost": 0.01},
                   {"type": "iteration_end", "iteration": number, "orchestrator": "x" * 200,
                    "agent_output": "a line of output\n" * 50}]
    path = written(world, *events, {"type": "complete", "outcome": "complete"})
    began = time.monotonic()
    run_replay = world.start("--replay", str(path))
    site = run_replay.site()
    opened = time.monotonic()
    browser.open(site.url)
    rows = "document.querySelectorAll('.iteration').length"
    assert poll(lambda: browser.evaluate(rows) == 1666 and shows(browser, "Task complete"), 30)
    print(f"\na replay of {len(events) + 1} events, {path.stat().st_size / 1e6:.1f} MB: "
          f"served after {opened - began:.2f} s, "
          f"whole in Chromium {time.monotonic() - opened:.2f} s later")
