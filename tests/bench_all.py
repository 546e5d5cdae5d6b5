"""Every benchmark, one after another, on the GPU where there is one, else on the CPU, and one table at the end:

    python tests/bench_all.py                      at the sizes of the device: on a CPU about ten minutes
    python tests/bench_all.py retrieval segment    those whose name begins so

A benchmark that fails is said to have failed, and the others run. Not a test: pytest does not collect it.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

# Words of the command line, and the lines of its output that the table shows.
BENCHMARKS = (
    ("retrieval ranking", r"N = .*"),
    ("retrieval encoder --compiled", r"(fp32|bf16) (eager|compiled): .*|this CPU has no bf16.*"),
    ("retrieval timm", r".*timm/vit_base_patch16_224 .*"),
    ("retrieval precision", r".* bf16: .*"),
    ("classify", r"\| (linear|attentive|both) .*"),
    ("knn", r"(plain|ours): .*"),
    ("segment", r"(floor|training, everything together|data path.*|loss and gradient|a step, all but the data): .*"),
    ("transfer", r".*the plain way.*times ours.*"),
)


def run(words: list[str], shown: str) -> tuple[str, list[str]]:
    """Runs a benchmark, its output passed on; returns how it ended, and the lines that match."""
    start, lines = time.monotonic(), []
    script = Path(__file__).with_name(f"bench_{words[0]}.py")
    process = subprocess.Popen([sys.executable, str(script), *words[1:]], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    ended = f"{time.monotonic() - start:.0f} s" if status == 0 else f"failed with status {status}"
    return ended, [line for line in lines if re.fullmatch(shown, line)] if status == 0 else lines[-1:]


def main():
    chosen = [(words.split(), shown) for words, shown in BENCHMARKS
              if not sys.argv[1:] or words.startswith(tuple(sys.argv[1:]))]
    rows = []
    for words, shown in chosen:
        print(f"\n== {' '.join(words)}", flush=True)
        rows.append((" ".join(words), *run(words, shown)))
    print("\n| benchmark | took | figures |\n| --- | --- | --- |")
    for name, ended, lines in rows:
        for line in lines or [""]:
            print(f"| {name} | {ended} | {line.strip('| ').replace('|', ', ')} |")
            name = ended = ""
    sys.exit(any("failed" in ended for _, ended, _ in rows))


if __name__ == "__main__":
    main()
