"""Other people's clients work as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai

from scripts.server_process import server_environment
from tests.e2e.cases import NUM_TOKENS, QUESTION
from tests.e2e.client import Admin
from tests.e2e.moving import move
from tests.e2e.plain import PlainAnswers
from tests.e2e.servers import CHECKOUT, OFFLINE, Server

BENCHMARK_TIMEOUT_S = 180
NUM_PROMPTS = 8
NUM_OUTPUT_TOKENS = 12

# What `vllm bench serve` runs. The command itself is not there in the CPU distribution, whose name
# it does not know.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_serving_benchmark_of_vllm(pool: Admin, llumsched_server: Server, tmp_path: Path) -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            BENCH_SERVE,
            "--backend=openai",
            f"--base-url={llumsched_server.url}",
            f"--model={pool.model}",
            "--dataset-name=random",
            f"--num-prompts={NUM_PROMPTS}",
            "--random-input-len=64",
            f"--random-output-len={NUM_OUTPUT_TOKENS}",
            "--ignore-eos",
            "--save-result",
            f"--result-dir={tmp_path}",
            "--result-filename=result.json",
        ],
        cwd=CHECKOUT,
        env=server_environment(**OFFLINE),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BENCHMARK_TIMEOUT_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == NUM_PROMPTS
    assert result["failed"] == 0
    assert result["total_output_tokens"] == NUM_PROMPTS * NUM_OUTPUT_TOKENS


def test_openai_package(pool: Admin, llumsched_server: Server, plain: PlainAnswers) -> None:
    text = ""
    with openai.OpenAI(base_url=f"{llumsched_server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model=pool.model,
            messages=[{"role": "user", "content": QUESTION[0]["content"]}],
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, chunk in enumerate(stream):
            text += chunk.choices[0].delta.content or ""
            if number == 4:
                assert move(pool, chunk.id).status == 200
    assert text == plain.streamed["chat"].text
