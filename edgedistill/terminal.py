"""Tables for the terminal: aligned columns, numbers to the right."""

from collections.abc import Sequence


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay cells out in columns two blanks apart; a column that holds only numbers goes to the right."""
    table = [headers, *rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(headers))]
    right = [all(is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def is_number(cell: str) -> bool:
    """Say whether a cell reads as a number, or as the dash that stands for none."""
    return cell[:1].isdigit() or cell[:2].lstrip("-").isdigit() or cell in ("", "-", "inf", "-inf")
