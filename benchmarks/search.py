r"""What a layer-wise search takes a trial, with and without reuse of codes and of what unchanged layers give.

    python benchmarks/search.py MODEL --task rte --data ./glue --examples 256 --trials 3

The model is a fine-tuned encoder. Both searches try the same in the same order, one after the other in this
process, and come to the same values, which is checked; the 17 trials at the start, of the whole model, are
left out of the figures. The first trial of a layer, in which the reusing search runs what stands in front of
it, is left out of the layer's median, and not of the sum.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

import optuna

from lexibit import LexibitConfig, checkpoint, tasks
from lexibit.search import Problem, search
from lexibit.search.objective import on_task
from lexibit.search.trials import storage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", default="rte")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--trials", type=int, default=3, help="of each layer")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--compute", default="float32")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = tasks.trainable(args.task)
    model, tokenizer = checkpoint.load_float(args.model), checkpoint.load_tokenizer(args.model)
    examples = task.load(args.data, "train", limit=args.examples)
    objective = on_task("loss", task, model, tokenizer, examples)
    found = {}
    for reuse in (True, False):
        problem = Problem(
            model, LexibitConfig("binary", args.bits), objective, reuse=reuse, compute=args.compute
        )
        with tempfile.TemporaryDirectory() as folder:
            where = storage(f"sqlite:///{folder}/search.db")
            found[reuse] = search(problem, "layer-wise", args.trials, study="search", where=where)
    if found[True].value != found[False].value or found[True].settings != found[False].settings:
        raise SystemExit("the two searches differ")
    print(f"| layer | with reuse, s | without, s | ratio |\n|{'---|' * 4}")
    ratios = []
    for name in list(found[True].stages)[1:]:
        seconds = [
            median(trial.seconds for trial in found[reuse].stages[name][1:]) for reuse in (True, False)
        ]
        ratios.append(seconds[1] / seconds[0])
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratios[-1]:.1f} |")
    total = [
        sum(
            trial.seconds
            for name, done in found[reuse].stages.items()
            if name != "all layers"
            for trial in done
        )
        for reuse in (True, False)
    ]
    print(f"| all trials of layers | {total[0]:.1f} | {total[1]:.1f} | {total[1] / total[0]:.1f} |")


if __name__ == "__main__":
    main()
