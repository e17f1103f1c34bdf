"""lleaves peer: its compiled LightGBM ensembles, 100 x 31 and 500 x 63 on 30 features, in its own environment.

Prints one JSON list of [name, value, unit]. 2,048 rotating rows, one thread, the Python call included; compiling
the large one takes minutes.
"""

import json
import statistics
import sys
import time

import lightgbm
import lleaves
import numpy as np


def microseconds(predict, parts, per_call):
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        for part in parts:
            predict(part, n_jobs=1)
        times.append((time.perf_counter() - begin) * 1e6 / len(parts) / per_call)
    return statistics.median(times[1:])


def main():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20_000, 30))
    y = (x[:, :5].sum(axis=1) + np.sin(3 * x[:, 5]) * x[:, 6] + rng.normal(size=len(x)) > 0).astype(float)
    rows = []
    for name, trees, leaves in (("", 100, 31), ("large_", 500, 63)):
        options = {"objective": "binary", "num_leaves": leaves, "verbosity": -1, "num_threads": 1, "seed": 1}
        path = f"{sys.argv[1]}/lleaves_{trees}x{leaves}.txt"
        lightgbm.train(options, lightgbm.Dataset(x, y), trees).save_model(path)
        model = lleaves.Model(model_file=path)
        begin = time.perf_counter()
        model.compile()
        rows.append([f"peers.lleaves.{name}compile_s", time.perf_counter() - begin, "s"])
        pool = np.ascontiguousarray(x[:2_048])
        single = [pool[i : i + 1] for i in range(len(pool))]
        batches = [pool[i : i + 256] for i in range(0, len(pool), 256)]
        rows.append([f"peers.lleaves.{name}single_us", microseconds(model.predict, single, 1), "us/row"])
        rows.append([f"peers.lleaves.{name}batch256_us_per_row", microseconds(model.predict, batches, 256), "us/row"])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
