// The sign that a picture is under way, for those that let one wait.

const LATE = 300; // milliseconds until it is shown
const TEXT = "Drawing …";

/** Marks the frame of the picture, and says so in the status. */
export class Busy {
  #frame; #status; #timer = 0; #isShown = false; #before = "";

  constructor(frame, status) {
    this.#frame = frame;
    this.#status = status;
  }

  /** A picture is awaited. */
  begin() {
    this.#timer ||= setTimeout(() => this.#show(), LATE);
  }

  /** One came, and a newer one is awaited: that is late by itself. */
  goOn() {
    if (!this.#timer || this.#isShown) return;
    this.end();
    this.begin();
  }

  /** Nothing is awaited. */
  end() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (!this.#isShown) return;
    this.#isShown = false;
    this.#frame.removeAttribute("aria-busy");
    if (this.#status.textContent === TEXT) this.#status.textContent = this.#before;
  }

  #show() {
    this.#isShown = true;
    this.#frame.setAttribute("aria-busy", "true");
    const isWrong = this.#status.classList.contains("wrong"); // and over, as this one was ordered
    this.#before = isWrong ? "" : this.#status.textContent;
    this.#status.classList.remove("wrong");
    this.#status.textContent = TEXT;
  }
}
