"""Which texts of a page are hard to read: WCAG AA asks for a contrast of 4.5 to 1."""

WEAK = """() => {
    // A canvas reads every spelling of a colour, oklch() too.
    const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const parse = (colour) => {
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
    const light = (colour) => {
        const [r, g, b] = colour.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            layers.push(colour);
            if (colour[3] === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const weak = [];
    for (const element of document.querySelectorAll("#content-main *, #content-main ~ * *")) {
        const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
        if (!text || !element.checkVisibility() || element.closest(".fsm-hidden, option, optgroup, select")) continue;
        const below = ground(element), own = over(parse(getComputedStyle(element).color), below);
        const [a, b] = [light(own), light(below)];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const isOurs = element.closest("[class*=fsm-]");
        if (ratio < 4.5 && isOurs) weak.push(`${element.className} "${text.slice(0, 40)}" ${ratio.toFixed(2)}`);
    }
    return weak;
}"""


def weak_texts(page):
    """Return the app's own texts that are too faint, with their contrast."""
    page.wait_for_load_state("load")
    return page.evaluate(WEAK)
