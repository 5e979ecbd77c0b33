// Counts the time to expiry down, by the seconds that the server's database said were left.
// Without this script the page says "in 3 h", as of when it was loaded.
"use strict";

(() => {
    let faces = []; // the element with the clock, the element that says when, the instant at which the time is up
    const twoDigits = (number) => String(number).padStart(2, "0");

    function clock(seconds) {
        const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24;
        const minutes = Math.floor(seconds / 60) % 60;
        return `${days ? `${days}:${twoDigits(hours)}` : hours}:${twoDigits(minutes)}:${twoDigits(seconds % 60)}`;
    }

    /** Give each time on the page a clock, after it; also when the page was renewed. */
    function begin() {
        const old = new Map(faces.map(([face, element]) => [element, face]));
        faces = [...document.querySelectorAll("#content-main time[data-fsm-left]")].map((element) => {
            const face = old.get(element) ?? document.createElement("span");
            old.delete(element);
            face.className = "fsm-countdown";
            face.setAttribute("role", "timer");
            if (element.nextSibling !== face) element.after(face);
            return [face, element, performance.now() + Number(element.dataset.fsmLeft) * 1000];
        });
        for (const face of old.values()) face.remove();
        tick();
    }

    function tick() {
        for (const [face, , end] of faces) {
            const rest = Math.max(0, Math.ceil((end - performance.now()) / 1000));
            face.textContent = clock(rest);
            face.classList.toggle("fsm-past", rest === 0);
        }
    }

    begin();
    setInterval(tick, 1000);
    document.addEventListener("fsm:renewed", begin);
})();
