"""A curve, and bars, as SVG text, drawn by hand: no library, small enough for a README."""

import math

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 170, 40, 50
COLOURS = {
    "p2pfs": "#0b6e4f",
    "default": "#38a169",
    "chain": "#888888",
    "aria2": "#c05621",
    "libtorrent": "#b7791f",
    "super": "#805ad5",
    "http": "#c53030",
}
NAMES = {"default": "p2pfs without options", "chain": "relay chain", "http": "one HTTP server", "super": "super-seeding"}


def _label(x, y, text, anchor="middle", more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{more}>{text}</text>'


def _spread(wanted, gap=15):
    """Heights near the wanted ones, in their order, that labels do not overlap at."""
    placed, last = {}, -gap
    for name, y in sorted(wanted.items(), key=lambda pair: pair[1]):
        last = placed[name] = max(y, last + gap)
    return placed


def curve(rows, size):
    """The last host's time over size / rate, by the number of hosts, one line for each method. Points of files of
    another size are hollow."""
    rows = [row for row in rows if row["last"]]
    series, others = {}, set()
    for row in sorted(rows, key=lambda row: row["nodes"]):
        series.setdefault(row["method"], []).append((row["nodes"], row["last"], row["size"] == size))
        others |= {row["size"]} - {size}
    title = f"{size >> 20} MiB to N hosts at once, links of {rows[0]['rate']}"
    counts = sorted({n for points in series.values() for n, *_ in points})
    top = max([2.0] + [last for points in series.values() for _, last, _ in points])
    span = max(math.log2(counts[-1] / counts[0]), 1)

    def x_of(nodes):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(nodes / counts[0]) / span

    def y_of(ratio):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(max(ratio, 1)) / math.log(top)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _label(WIDTH / 2, 20, title, more=' font-size="14"'),
        _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "hosts that fetch"),
        _label(16, HEIGHT / 2, "last host done, over size / rate",
               more=f' transform="rotate(-90 16 {HEIGHT // 2})"'),
    ]  # fmt: skip
    for ratio in (1, 1.25, 1.5, 2, 3, 4, 8, 16, 32, 64):
        if ratio <= top * 1.01:
            y = y_of(ratio)
            out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            out.append(_label(LEFT - 8, y + 4, f"{ratio:g}", "end"))
    for count in counts:
        out.append(_label(x_of(count), HEIGHT - BOTTOM + 18, count))
    ends = _spread({name: y_of(points[-1][1]) for name, points in series.items()})
    for name, points in series.items():
        line = " ".join(f"{x_of(n):.1f},{y_of(last):.1f}" for n, last, _ in points)
        out.append(
            f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        )
        out.extend(
            f'<circle cx="{x_of(n):.1f}" cy="{y_of(last):.1f}" r="3" stroke="{COLOURS[name]}" '
            f'fill="{COLOURS[name] if same else "white"}"/>'
            for n, last, same in points
        )
        out.append(_label(WIDTH - RIGHT + 8, ends[name] + 4, NAMES.get(name, name), "start",
                          f' fill="{COLOURS[name]}"'))  # fmt: skip
    if others:
        sizes = ", ".join(f"{other >> 20} MiB" for other in sorted(others))
        out.append(_label(WIDTH - 10, HEIGHT - 12, f"hollow: {sizes}", "end"))
    return "\n".join(out) + "\n</svg>\n"


def _panel(out, y, title, bars, marks):
    """Bars (label, length, words, colour, goal) below a title, to the scale of `marks`; the y below them."""
    left, right, step = 330, WIDTH - 70, 20
    bottom = y + 14 + step * len(bars)

    def x_of(value):
        return left + (right - left) * min(value / marks[-1], 1)

    out.append(_label(left, y, title, "start", ' font-weight="bold"'))
    for mark in marks:
        out.append(f'<path d="M{x_of(mark):.1f} {y + 8}V{bottom}" stroke="#ddd"/>')
        out.append(_label(x_of(mark), bottom + 14, f"{mark:g}"))
    for k, (label, value, words, colour, goal) in enumerate(bars):
        at = y + 14 + step * k
        out.append(_label(left - 8, at + 11, label, "end"))
        out.append(f'<rect x="{left}" y="{at}" width="{x_of(value) - left:.1f}" height="14" fill="{colour}"/>')
        out.append(_label(x_of(value) + 5, at + 11, words, "start"))
        if goal:
            out.append(f'<path d="M{x_of(goal):.1f} {at - 2}v18" stroke="black" stroke-width="2"/>')
    return bottom + 44


def bars(rows, title):
    """Of a table's rows: rates over their reference's, and seconds of what took a time. A goal is a black line."""
    good, short, plain = COLOURS["p2pfs"], COLOURS["aria2"], COLOURS["chain"]
    rates, times = [], []
    for row in rows:
        if row["ratio"] is None or row["unit"] not in ("GB/s", "s"):
            continue
        label, goal = row["what"].split(" (of ")[0], float(row["goal"].split()[1]) if row["goal"] else None
        ratio = row["ratio"]
        if row["unit"] == "GB/s":
            colour = plain if goal is None else good if ratio >= goal else short
            rates.append((f"{row['case']}, {label}", ratio, f"{ratio:.2f}", colour, goal))
        else:
            colour = plain if goal is None else good if ratio <= goal else short
            scale = row["median"] / ratio
            times.append((label, row["median"], f"{row['median']:.2f} s", colour, goal and goal * scale))
    out = [_label(WIDTH / 2, 20, title, more=' font-size="14"')]
    y = 50
    if rates:
        y = _panel(out, y, "rate, of the reference's (longer is better)", rates, (0, 0.25, 0.5, 0.75, 1, 1.25))
    if times:
        longest = max(value for _, value, *_ in times)
        step = 10 ** math.floor(math.log10(longest))
        y = _panel(out, y, "seconds (shorter is better)", times, [k * step for k in range(math.ceil(longest / step) + 1)])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y:.0f}" fill="white"/>', *out, "</svg>"]) + "\n"
