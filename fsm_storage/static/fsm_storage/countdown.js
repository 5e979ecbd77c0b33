// Counts the time to expiry down, by the seconds that the server's database said were left.
// Without this script the page says "in 3 h", as of when it was loaded.
"use strict";

(() => {
    const elements = [...document.querySelectorAll("#content-main time[data-fsm-left]")];
    const start = performance.now();
    const twoDigits = (number) => String(number).padStart(2, "0");

    function clock(seconds) {
        const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24;
        const minutes = Math.floor(seconds / 60) % 60;
        return `${days ? `${days}:${twoDigits(hours)}` : hours}:${twoDigits(minutes)}:${twoDigits(seconds % 60)}`;
    }

    const faces = elements.map((element) => {
        const face = document.createElement("span");
        face.className = "fsm-countdown";
        face.setAttribute("role", "timer");
        element.after(" ", face);
        return [face, Number(element.dataset.fsmLeft)];
    });

    function tick() {
        const gone = Math.floor((performance.now() - start) / 1000);
        for (const [face, left] of faces) {
            const rest = Math.max(0, left - gone);
            face.textContent = clock(rest);
            face.classList.toggle("fsm-past", rest === 0);
        }
    }

    if (faces.length) {
        tick();
        setInterval(tick, 1000);
    }
})();
