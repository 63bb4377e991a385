"""What preprocessing says when it is done: what was read and what was not, the ledger's table, warnings at the end."""

from collections import Counter

from ochat_train.conversations.dedupe import DROP_REASONS
from ochat_train.preprocess.assemble import Totals
from ochat_train.preprocess.ledger import Ledger
from ochat_train.recipe import DataSection

_MAX_LINES = 20  # for files, and names on a line; more are counted


def make_table(
    totals: Totals, ledger: Ledger, overlong: dict[str, int], data: DataSection, left_out: Counter[str]
) -> str:
    """All of it, for a person.

    overlong: the sums of OVERLONG_COLUMNS by name. left_out: how many files of which suffix were not read in folders.
    """
    lines = [*_input_lines(totals.dialects, left_out), *_unread_lines(totals.unread, data), ledger.table()]
    return "\n".join([*lines, *_overlong_lines(overlong, data), *_warning_lines(totals, ledger, data)])


def _input_lines(dialects: Counter[tuple[str, str, str]], left_out: Counter[str]) -> list[str]:
    """What was read, a line for each file and dialect, or for each form if these are many; and what was left out."""
    if len(dialects) > _MAX_LINES:
        by_form: Counter[tuple[str, str, str]] = Counter()
        for (_, form, dialect), count in dialects.items():
            by_form["", form, dialect] += count
        dialects = by_form
    lines = [
        f"{f'{file}: ' if file else ''}{form}, {dialect}: {count:,} record{'s' * (count != 1)}"
        for (file, form, dialect), count in sorted(dialects.items())
    ]
    if left_out:
        suffixes = ", ".join(f"{suffix} {count:,}" for suffix, count in left_out.most_common(_MAX_LINES))
        lines.append(f"left out in folders, hidden or of other suffixes: {suffixes}")
    return ["read:", *(f"  {line}" for line in lines), ""]


def _unread_lines(unread: Counter[tuple[str, str, str]], data: DataSection) -> list[str]:
    """What was met and not read, a line for each file and kind, or for each kind if these are many."""
    used = {name for source in data.sources for name in (*source.where, *source.where_not)}
    counts = {
        key: count
        for key, count in unread.items()
        if key[1] != "hint" and (key[1] != "record field" or key[2] not in used)
    }
    by_kind: dict[tuple[str, str], Counter[str]] = {}
    is_long = len({(file, kind) for file, kind, _ in counts}) > _MAX_LINES
    for (file, kind, name), count in counts.items():
        by_kind.setdefault(("" if is_long else file, kind), Counter())[name] += count
    lines = []
    for (file, kind), names in sorted(by_kind.items()):
        shown = ", ".join(
            f"{_show_name(name)} {count:,}" for name, count in sorted(names.items(), key=_rank)[:_MAX_LINES]
        )
        more = f", and {len(names) - _MAX_LINES:,} more" if len(names) > _MAX_LINES else ""
        lines.append(f"  {f'{file}: ' if file else ''}{kind}s {shown}{more}")
    return ["met and not read:", *lines, ""] if lines else []


def _rank(item: tuple[str, int]) -> tuple[int, str]:
    """The commonest first, and of equal ones by name."""
    return -item[1], item[0]


def _show_name(name: str, max_chars: int = 80) -> str:
    """A name out of a dump, on one line."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def _warning_lines(totals: Totals, ledger: Ledger, data: DataSection) -> list[str]:
    """The sources without a record, and the files of which nothing is kept, with what would read them."""
    lines = [
        f"WARNING: source {source.name} has no record: {', '.join(source.paths)} holds none that its where and "
        "where_not take"
        for source in data.sources
        if not ledger.counts[source.name].num_in
    ]
    reasons: dict[str, Counter[str]] = {}
    for (file, reason), count in totals.outcomes.items():
        reasons.setdefault(file, Counter())[reason] += count
    copies = set(DROP_REASONS.values())
    lost = [file for file in sorted(reasons) if not reasons[file][""] and not reasons[file].keys() - {""} <= copies]
    for file in lost[:_MAX_LINES]:
        forms = {f"{form}, {dialect}" for name, form, dialect in totals.dialects if name == file} or {"ShareGPT page"}
        lines.append(f"WARNING: nothing is kept of {file or 'the saved pages'} ({' and '.join(sorted(forms))}):")
        for reason, count in reasons[file].most_common():
            lines.append(f"  {reason} {count:,}, such as: {_show_name(totals.details[file, reason], 300)}")
        of_file = {(kind, name): count for (other, kind, name), count in totals.unread.items() if other == file}
        if fields := sorted(name for kind, name in of_file if kind == "record field"):
            lines.append(f"  fields of its records that are not read: {', '.join(map(_show_name, fields[:40]))}")
        hints = [(count, name) for (kind, name), count in of_file.items() if kind == "hint"]
        for _, hint in sorted(hints, reverse=True)[:3]:
            lines.append(
                f"  to read it, write into {'the recipe' if hint.startswith('data.') else 'its source'}: {hint}"
            )
    if len(lost) > _MAX_LINES:
        lines.append(f"WARNING: nothing is kept of {len(lost) - _MAX_LINES:,} more files")
    return ["", *lines] if lines else []


def _overlong_lines(counts: dict[str, int], data: DataSection) -> list[str]:
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
