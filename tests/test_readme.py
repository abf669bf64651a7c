"""README.md against the records in tests/golden that its tables are made from."""
import re
from pathlib import Path
from statistics import fmean

import eval as eval_script
from minisap.checkpoint import read_json
from minisap.compare import Series
from minisap.evaluate import format_value
from minisap.laboratory import other_tables
from minisap.stats import wilson
from minisap.table import legend, markdown, rows_of

ROOT = Path(__file__).resolve().parents[1]
README, GOLDEN = (ROOT / "README.md").read_text(), ROOT / "tests" / "golden"


def test_the_tables_are_what_the_records_say(capsys):
    """The curve word for word; and every number of the other tables, from `eval.py --curves` on the committed records."""
    eval_script.main([str(GOLDEN / "smollm2" / run) for run in ("seed0", "seed1", "sap0", "sap1")] + ["--curves"])
    curve = capsys.readouterr().out
    assert curve in README
    before = format_value(next(r for r in read_json(GOLDEN / "smollm2" / "base.json") if r["metric"] == "harmful_score")).strip()
    assert f"{before} before" in re.sub(r"\s+", " ", README)
    tables = [line.replace("**", "") for line in README.splitlines() if re.match(r"\| (\(start\)|\**`).*\d \[", line)]
    for record in ("gated", "world", "unprojected", "benign"):
        eval_script.main([str(GOLDEN / "world" / f"{record}{seed}") for seed in range(5)] + ["--curves"])
    for record in GOLDEN.glob("world/format*"):
        eval_script.main([str(record), "--curves"])
    told = curve + capsys.readouterr().out
    assert len(tables) == 9 + 8 + 6 + 12
    for line in tables:
        for cell in line.strip("| ").split(" | ")[1:]:
            assert cell in told, line


def test_the_world_s_table_is_what_the_record_says():
    found = read_json(GOLDEN / "world" / "table.json")
    for comparisons in found["settings"].values():
        assert markdown(rows_of(comparisons, found["against"])) in README
    assert legend(found["settings"]["poisoned"], found["against"]) in re.sub(r"\s+", " ", README)
    for _, rows in other_tables(found):
        assert markdown(rows) in README


def test_the_observations_are_what_the_record_says():
    for check in read_json(GOLDEN / "world" / "checks.json"):
        count = sum(check["holds"].values())
        word = {0: "**no**", 3: "yes"}.get(count, f"{count} of 3")
        assert f"| {check['claim']} | {word} | {' | '.join(check['numbers'].values())} |" in README


def test_the_study_s_answers_are_what_the_record_says():
    answered = {(r["protocol"], r["set"], r["seed"]): r["value"] for r in read_json(GOLDEN / "world" / "answers.json")}
    for name in ("unsafe", "co_task", "adv_4", "safe"):
        cells = (" ".join(f"{100 * answered[protocol, name, seed]:.0f}" for seed in (0, 1, 2)) for protocol in ("ssft", "benign", "sap", "sft"))
        assert f"\n| {name} | {' | '.join(cells)} |\n" in README


def test_the_real_pair_is_what_the_record_says():
    series = Series(read_json(GOLDEN / "smollm2" / "compare.json"))
    both = lambda cell: " | ".join(cell(protocol) for protocol in ("before", "after"))
    column, last_and_mean = series.mean, lambda values, digits: f"{values[-1]:.{digits}f}; {fmean(values):.{digits}f}"

    def answered(protocol, name):
        value = column(protocol, name, "comply")[0]
        low, high = wilson(round(40 * value), 40)
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def along(name):
        return " ".join(f"{100 * column('after', name, f'comply_alpha_{a}')[0]:.0f}" for a in (0.0, 0.25, 0.5, 0.75, 1.0)) + " %"

    seen = [u / s for u, s in zip(*(column("after", name, "delta_a") for name in ("unsafe", "safe")))]
    assert len(seen) == 30
    for cells in ("unsafe prompts answered % | " + both(lambda p: answered(p, "unsafe")), "safe prompts answered % | " + both(lambda p: answered(p, "safe")),
                  "separation of clusters (τ), last layer; mean over layers | " + both(lambda p: last_and_mean(column(p, "unsafe", "separation"), 1)),
                  "sensitivity free of scale, unsafe; safe prompts | " + both(
                      lambda p: "; ".join(f"{column(p, name, 'lipschitz_relative')[0]:.1f}" for name in ("unsafe", "safe"))),
                  "sin θ of ΔW, mean over layers; a random direction's | | " + "; ".join(
                      f"{fmean(column('after', None, metric)):.3f}" for metric in ("sin_theta", "sin_theta_random")),
                  f"‖ΔW a‖, unsafe over safe, last layer; mean over layers | | {last_and_mean(seen, 2)}",
                  f"unsafe prompts answered at α = 0, 0.25, 0.5, 0.75, 1 | | {along('unsafe')}", f"safe ones | | {along('safe')}"):
        assert f"\n| {cells} |\n" in README, cells


def test_the_precision_is_what_the_record_says():
    for row in read_json(GOLDEN / "smollm2" / "precision.json"):
        cell = f"{row['cosine']:.3f} ({row['size']:.3f})" if "size" in row else f"{row['mean_cosine']:.3f} ({row['lowest_cosine']:.3f})"
        line, = [line for line in README.splitlines() if line.startswith(f"| {row['direction'].replace('epsilon', 'ε =')} ")]
        assert line.split(" | ")[1 + ["float64", "float32", "bfloat16"].index(row["dtype"])].strip("* |") == cell, line


def test_ci_runs_exactly_the_test_command():
    command = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]
    assert f"\n{command}\n" in README
