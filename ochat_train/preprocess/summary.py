"""What preprocessing prints at its end: what was read and what was not, the ledger's table, warnings."""

from collections import Counter
from collections.abc import Mapping

from ochat_train.conversations.dedupe import DROP_REASONS, LEAK
from ochat_train.preprocess.assemble import InputSummary
from ochat_train.preprocess.job import Job
from ochat_train.preprocess.ledger import Ledger
from ochat_train.recipe import DataSection

_MAX_LINES = 20  # for files, and names on a line; more are counted


def make_table(job: Job, ledger: Ledger, summary: InputSummary) -> str:
    """All of it, for a person."""
    total = ledger.total
    several = f"{total.num_records:,} records are {total.num_in:,} conversations, which are counted here"
    lines = [
        *_input_lines(summary, job.left_out),
        *_unread_lines(summary, job.data),
        *([several, ""] if total.num_in != total.num_records else []),
        ledger.table(),
        *_leak_lines(ledger, job.data),
        *_overlong_lines(summary.overlong, job.data),
        *_warning_lines(summary, ledger, job.data),
    ]
    return "\n".join(lines)


def _input_lines(summary: InputSummary, left_out: Counter[str]) -> list[str]:
    """What was read, a line for each file and dialect, or for each form if these are many; and what was left out."""
    dialects = summary.dialects
    if len(dialects) > _MAX_LINES:
        dialects = Counter()
        for (_, form, dialect), count in summary.dialects.items():
            dialects["", form, dialect] += count
    lines = [
        f"  {f'{file}: ' if file else ''}{form}, {dialect}: {count:,} record{'s' * (count != 1)}"
        for (file, form, dialect), count in sorted(dialects.items())
    ]
    if left_out:
        suffixes = ", ".join(f"{suffix} {count:,}" for suffix, count in left_out.most_common(_MAX_LINES))
        lines.append(f"  left out in folders, hidden or of other suffixes: {suffixes}")
    return ["read:", *lines, ""]


def _unread_lines(summary: InputSummary, data: DataSection) -> list[str]:
    """What was met and not read, a line for each file and kind, or for each kind if these are many."""
    used = _used_fields(data)
    by_file: dict[tuple[str, str], Counter[str]] = {}
    by_kind: dict[tuple[str, str], Counter[str]] = {}
    for (file, kind, name), count in summary.unread.items():
        if kind != "hint" and not (kind in ("record field", "answer field") and name in used):
            by_file.setdefault((file, kind), Counter())[name] += count
            by_kind.setdefault(("", kind), Counter())[name] += count
    lines = []
    for (file, kind), names in sorted((by_file if len(by_file) <= _MAX_LINES else by_kind).items()):
        commonest = sorted(names.items(), key=lambda item: (-item[1], item[0]))[:_MAX_LINES]
        shown = ", ".join(f"{_show_name(name)} {count:,}" for name, count in commonest)
        more = f", and {len(names) - _MAX_LINES:,} more" if len(names) > _MAX_LINES else ""
        lines.append(f"  {f'{file}: ' if file else ''}{kind}s {shown}{more}")
    return ["met and not read:", *lines, ""] if lines else []


def _used_fields(data: DataSection) -> set[str | None]:
    """The fields that the sources of the recipe test or weigh by."""
    sources = data.by_key.values()
    tested = {name for source in sources for name in (*source.where, *source.where_not)}
    return tested | {source.weight_field for source in sources}


def _show_name(name: str, max_chars: int = 80) -> str:
    """A name out of a dump, on one line."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def _leak_lines(ledger: Ledger, data: DataSection) -> list[str]:
    """How many conversations are not trained because an eval source has them; nothing if there is no eval source."""
    if not data.eval_sources:
        return []
    leak = DROP_REASONS[LEAK]
    counts = [ledger.counts[source.name].dropped.get(leak) for source in data.sources]
    near = (
        f"nearly the same by data.dedupe.near {data.dedupe.near:g}" if data.dedupe.near else "data.dedupe.near is off"
    )
    return [
        "",
        f"in data.eval_sources too, and so not trained: {sum(tally.num_records for tally in counts if tally):,} "
        f"conversations ({leak}: the same turns, or one begins with the other; {near})",
    ]


def _overlong_lines(counts: Mapping[str, int], data: DataSection) -> list[str]:
    """What each choice of data.overlong keeps of the conversations that are too long; nothing if there are none."""
    if not counts["conversations"]:
        return []
    shares = ", ".join(
        f"{choice} {100 * counts[f'{choice}_supervised_tokens'] / max(counts['supervised_tokens'], 1):.1f} %"
        for choice in ("split", "truncate", "drop")
    )
    return [
        "",
        f"above data.max_tokens {data.max_tokens:,}: {counts['conversations']:,} conversations of "
        f"{counts['tokens']:,} tokens, {counts['supervised_tokens']:,} supervised; of these would be kept by {shares} "
        f"(data.overlong is {data.overlong})",
    ]


def _warning_lines(summary: InputSummary, ledger: Ledger, data: DataSection) -> list[str]:
    """The sources without a record, and the files of which nothing is kept, with what would read them."""
    lines = [
        f"WARNING: source {source.name} has no record: {', '.join(source.paths)} holds none that its where and "
        "where_not take"
        for source in data.by_key.values()
        if not ledger.counts[source.name].num_in
    ]
    alike = [file for file, kind, name in summary.unread if (kind, name) == ("answer field", "preference")]
    if alike and "preference" not in _used_fields(data):
        lines.append(
            f"WARNING: {alike[0] or 'saved pages'}: chosen and rejected answers are trained alike; give each a source, "
            "with where: {preference: chosen} and where: {preference: rejected}"
        )
    reasons: dict[str, Counter[str]] = {}
    for (file, reason), count in summary.outcomes.items():
        reasons.setdefault(file, Counter())[reason] += count
    # A file whose records are all copies of kept ones is not lost.
    saved = {"", *DROP_REASONS.values()} - {DROP_REASONS[LEAK]}
    lost = [file for file in sorted(reasons) if "" not in reasons[file] and not reasons[file].keys() <= saved]
    for file in lost[:_MAX_LINES]:
        forms = {f"{form}, {dialect}" for name, form, dialect in summary.dialects if name == file} or {"ShareGPT page"}
        lines.append(f"WARNING: nothing is kept of {file or 'the saved pages'} ({' and '.join(sorted(forms))}):")
        for reason, count in reasons[file].most_common():
            lines.append(f"  {reason} {count:,}, such as: {_show_name(summary.details[file, reason], 300)}")
        unread = [(count, kind, name) for (other, kind, name), count in summary.unread.items() if other == file]
        if fields := sorted(name for _, kind, name in unread if kind == "record field"):
            lines.append(f"  fields of its records that are not read: {', '.join(map(_show_name, fields[:40]))}")
        for _, _, hint in sorted((item for item in unread if item[1] == "hint"), reverse=True)[:3]:
            place = "the recipe" if hint.startswith("data.") else "its source"
            lines.append(f"  to read it, write into {place}: {hint}")
    if len(lost) > _MAX_LINES:
        lines.append(f"WARNING: nothing is kept of {len(lost) - _MAX_LINES:,} more files")
    return ["", *lines] if lines else []
