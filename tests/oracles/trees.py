"""Slow, obvious scoring of tree ensembles: from the shared form, from LightGBM's text, from XGBoost's JSON.

The last two read the files on their own, so that a mistake in a loader shows. One row at a time, one node at a time.
"""

import math

import numpy as np

F32 = np.float32
LIGHTGBM_ZERO = float(F32(1e-35))


def score_form(form, x):
    """Raw scores of one row from a TreeEnsemble: its sums, in its precision, base included (SUM and AVERAGE)."""
    real = F32 if form.accumulate32 else float
    acc = [real(0)] * form.n_raw
    if form.base_first:
        acc = [real(b) for b in form.base]
    for root in form.roots:
        at = root
        while at >= 0:
            value = float(x[form.feature[at]])
            if form.round_input:
                value = float(F32(value))
            steps = form.steps[form.steps_begin[at] : form.steps_begin[at + 1]]
            if math.isnan(value):
                yes = form.nan_yes[at]
            elif steps:
                yes = bool(form.steps_first[at]) ^ (sum(step < value for step in steps) % 2 == 1)
            else:
                yes = value <= form.threshold[at]
            at = form.yes[at] if yes else form.no[at]
        for k in range(form.weight_begin[~at], form.weight_begin[~at + 1]):
            target = form.weight_target[k]
            acc[target] = real(acc[target] + real(form.weight[k]))
    if form.base and not form.base_first:
        acc = [real(a + real(b)) for a, b in zip(acc, form.base)]
    return [float(a) for a in acc]


def lightgbm_raw(text, x):
    """Raw scores of one row from LightGBM's model text; the sums of a random forest are not averaged."""
    head, *blocks = text.split("end of trees")[0].split("\nTree=")
    per_iteration = int(head.split("num_tree_per_iteration=")[1].split()[0])
    acc = [0.0] * per_iteration
    for number, block in enumerate(blocks):
        tree = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        leaf = [float(v) for v in tree["leaf_value"].split()]
        at = 0
        if len(leaf) == 1:
            at = -1
        while at >= 0:
            kind = int(tree["decision_type"].split()[at])
            threshold = float(tree["threshold"].split()[at])
            value = float(x[int(tree["split_feature"].split()[at])])
            if abs(value) <= LIGHTGBM_ZERO:
                value = 0.0
            missing = kind >> 2 & 3
            if kind & 1:
                left = False
                if not math.isnan(value) and abs(value) < 2**31 and int(value) >= 0:
                    bounds = [int(v) for v in tree["cat_boundaries"].split()]
                    words = [int(v) for v in tree["cat_threshold"].split()]
                    words = words[bounds[int(threshold)] : bounds[int(threshold) + 1]]
                    word, bit = divmod(int(value), 32)
                    left = word < len(words) and words[word] >> bit & 1 == 1
            else:
                if math.isnan(value) and missing != 2:
                    value = 0.0
                if (missing == 1 and abs(value) <= LIGHTGBM_ZERO) or (missing == 2 and math.isnan(value)):
                    left = kind & 2 == 2
                else:
                    left = value <= threshold
            at = int(tree["left_child" if left else "right_child"].split()[at])
        acc[number % per_iteration] += leaf[~at]
    return acc


def xgboost_raw(document, x, base_margin):
    """Margins of one row from XGBoost's parsed JSON; base_margin: the intercept, one per output."""
    booster = document["learner"]["gradient_booster"]
    model = booster["gbtree"]["model"] if booster["name"] == "dart" else booster["model"]
    weights = booster.get("weight_drop", model.get("weight_drop", []))  # in the model from XGBoost 3.3 on,
    weights = weights + [1.0] * (len(model["trees"]) - len(weights))  # and maybe of the first trees alone
    acc = [F32(b) for b in base_margin]
    for tree, group, weight in zip(model["trees"], model["tree_info"], weights):
        at = 0
        sets = {
            node: tree["categories"][begin : begin + size]
            for node, begin, size in zip(
                tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"]
            )
        }
        while tree["left_children"][at] >= 0:
            value = F32(x[tree["split_indices"][at]])
            if np.isnan(value):
                left = tree["default_left"][at] == 1
            elif tree["split_type"][at] == 1:
                left = value < 0 or value >= 16777216 or int(value) not in sets.get(at, [])
            else:
                left = value < F32(tree["split_conditions"][at])
            at = tree["left_children" if left else "right_children"][at]
        if "leaf_weights" in tree and int(tree["tree_param"]["size_leaf_vector"]) > 1:
            width = len(acc)
            first = tree["right_children"][at] * width
            for k in range(width):
                acc[k] = F32(acc[k] + F32(weight) * F32(tree["leaf_weights"][first + k]))
        else:
            acc[group] = F32(acc[group] + F32(weight) * F32(tree["split_conditions"][at]))
    return [float(a) for a in acc]
