"""vLLM as a baseline, through an interpreter of its own: its dependencies do not go with ours.

The script below is written to a temporary folder beside the model and run by that interpreter. It
reads one JSON object from stdin, {model, dummy, dtype, first, length, batches, context}, and prints
one on its last line: {"vllm": version, "seconds": {batch: [readings]}}.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from prototok.model.frozen_lm import FrozenLM

_TIMEOUT = 1800  # seconds; loading and compiling included

SCRIPT = """
import json, sys, time

try:
    import vllm
    from vllm import LLM, SamplingParams
except ImportError as error:
    sys.exit(f"vllm cannot be imported ({error})")

task = json.load(sys.stdin)
llm = LLM(
    model=task["model"], dtype=task["dtype"], skip_tokenizer_init=True, seed=0,
    max_model_len=task["context"], load_format="dummy" if task["dummy"] else "auto",
    gpu_memory_utilization=0.6, enable_prefix_caching=False,
)
settings = SamplingParams(
    temperature=0.0, max_tokens=task["length"], min_tokens=task["length"], ignore_eos=True,
    detokenize=False,
)
seconds = {}
for batch in task["batches"]:
    prompts = [{"prompt_token_ids": [task["first"]]} for _ in range(batch)]
    readings = []
    for turn in range(6):
        clock = time.perf_counter()
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        if turn >= 2:  # the first ones warm up
            readings.append(time.perf_counter() - clock)
        made = {len(output.outputs[0].token_ids) for output in outputs}
        if made != {task["length"]}:
            sys.exit(f"vllm generated {sorted(made)} tokens where {task['length']} were asked for")
    seconds[str(batch)] = readings
print(json.dumps({"vllm": vllm.__version__, "seconds": seconds}))
"""


def vllm_seconds(
    lm: FrozenLM, length: int, batches: tuple[int, ...], python: Path
) -> dict[int, list[float]]:
    """Time vLLM: seconds of each reading by batch size, exactly `length` greedy tokens behind one.

    The model's weights and configuration are saved for it; of random weights the configuration
    alone, and vLLM makes up its own.

    Raises:
        ValueError: `python` is no interpreter, has no vllm, or vllm failed; its last line is shown.
    """
    dummy = "(random weights)" in lm.identity.name
    with tempfile.TemporaryDirectory() as folder:
        if dummy:
            lm.source.config.save_pretrained(folder)
        else:
            lm.source.save_pretrained(folder)
        script = Path(folder) / "measure_vllm.py"
        script.write_text(SCRIPT)
        task = {
            "model": folder, "dummy": dummy, "dtype": str(lm.dtype).removeprefix("torch."),
            "first": lm.bos_id or 0, "length": length, "batches": list(batches),
            "context": length + 1,
        }  # fmt: skip
        try:
            ended = subprocess.run(
                [str(python), str(script)], input=json.dumps(task), capture_output=True, text=True,
                check=False, timeout=_TIMEOUT,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"vllm-python: {python} could not be run ({error})") from error
    lines = ended.stdout.strip().split("\n")
    if ended.returncode != 0:
        said = (ended.stderr.strip() or ended.stdout.strip() or "no output").split("\n")[-1]
        raise ValueError(f"vllm-python: {python} failed, {said}")
    try:
        found = json.loads(lines[-1])["seconds"]
        return {batch: [float(s) for s in found[str(batch)]] for batch in batches}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"vllm-python: {python} printed {lines[-1]!r}, not timings") from None
