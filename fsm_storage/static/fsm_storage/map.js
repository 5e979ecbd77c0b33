// Lays the map out again with dagre, which crosses fewer edges than the server's own layout. The page is whole
// without this: nodes, links, texts and looks are the server's, only places are changed here.
"use strict";

{
const layOut = () => {
    const svg = document.querySelector("svg.fsm-map");
    if (!svg || typeof dagre === "undefined") return;
    const nodes = [...svg.querySelectorAll("[data-node]")];
    const edges = [...svg.querySelectorAll("[data-source]")];
    const joined = new Set(edges.flatMap((edge) => [edge.dataset.source, edge.dataset.target]));
    const MARGIN = 20, GAP = 18, PER_ROW = 6;

    const graph = new dagre.graphlib.Graph({ multigraph: true });
    graph.setGraph({ nodesep: GAP, ranksep: 36, edgesep: 10, marginx: MARGIN, marginy: MARGIN });
    const rect = svg.querySelector("[data-node] rect");
    const width = Number(rect.getAttribute("width")), height = Number(rect.getAttribute("height"));
    for (const node of nodes) {
        if (joined.has(node.dataset.node)) graph.setNode(node.dataset.node, { width, height });
    }
    edges.forEach((edge, at) => {
        const text = edge.querySelector("text");
        // What many take is drawn the straightest.
        const weight = Math.round(Number(edge.querySelector("path").getAttribute("stroke-width")) ** 3);
        const label = { width: text.textContent.length * 7, height: 12, labelpos: "c", weight };
        graph.setEdge(edge.dataset.source, edge.dataset.target, label, String(at));
    });
    if (!graph.nodeCount()) return;
    dagre.layout(graph);

    const size = graph.graph();
    let right = size.width, bottom = size.height;
    const move = (node, x, y) => node.setAttribute("transform", `translate(${x.toFixed(1)},${y.toFixed(1)})`);
    const lonely = nodes.filter((node) => !joined.has(node.dataset.node));
    for (const node of nodes) {
        const place = graph.node(node.dataset.node);
        if (place) move(node, place.x - width / 2, place.y - height / 2);
    }
    lonely.forEach((node, at) => {
        const x = MARGIN + (at % PER_ROW) * (width + GAP), y = size.height + Math.floor(at / PER_ROW) * (height + GAP);
        move(node, x, y);
        right = Math.max(right, x + width + MARGIN);
        bottom = Math.max(bottom, y + height + MARGIN);
    });
    edges.forEach((edge, at) => {
        const way = graph.edge(edge.dataset.source, edge.dataset.target, String(at));
        edge.querySelector("path").setAttribute("d", curve(way.points));
        const text = edge.querySelector("text");
        text.setAttribute("x", way.x.toFixed(1));
        text.setAttribute("y", way.y.toFixed(1));
    });
    svg.setAttribute("viewBox", `0 0 ${right.toFixed(1)} ${bottom.toFixed(1)}`);
    svg.setAttribute("width", right.toFixed(1));
    svg.setAttribute("height", bottom.toFixed(1));
    svg.dataset.layout = "dagre";

    // Through the middles between the points, so that the way is smooth and keeps to the bends.
    function curve(points) {
        const [first, ...rest] = points;
        let text = `M${first.x.toFixed(1)},${first.y.toFixed(1)}`;
        rest.forEach((point, at) => {
            const next = rest[at + 1];
            const x = next ? (point.x + next.x) / 2 : point.x;
            const y = next ? (point.y + next.y) / 2 : point.y;
            text += next
                ? `Q${point.x.toFixed(1)},${point.y.toFixed(1)} ${x.toFixed(1)},${y.toFixed(1)}`
                : `L${point.x.toFixed(1)},${point.y.toFixed(1)}`;
        });
        return text;
    }
};

layOut();
document.addEventListener("fsm:renewed", layOut); // which brings back the server's places
}
