// The form: what a picture is ordered with, within what the loaded model takes.

const $ = (id) => document.getElementById(id);

/** A seed that every program can read. */
const anySeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

const isSeed = (text) => /^\d{1,20}$/.test(text) && BigInt(text) < 2n ** 64n;
const TYPED = { seed: "Seed", width: "Width", height: "Height" }; // fields that take any text

export class Settings {
  #loras = new Map(); // id -> {name, slider}

  /** `changed()` is called when a value became another, `tell(text)` when one could not be taken. */
  constructor(changed, tell) {
    for (const id of ["prompt", "negative"]) $(id).addEventListener("input", () => changed());
    for (const id of Object.keys(TYPED)) {
      $(id).addEventListener("input", () => {
        this.#hint(id, "becomes");
        changed();
      });
      $(id).addEventListener("change", () => {
        const hint = this.#hint(id, "became");
        this.#accept(id); // as it is sent
        if (hint) tell(`${hint}.`);
      });
    }
    for (const id of ["steps", "guidance", "strength", "control", "quick"]) {
      $(id).addEventListener("input", () => {
        this.#tell(id);
        changed();
      });
    }
    this.changed = changed;
    this.reseed();
    for (const id of ["strength", "control", "quick"]) this.#tell(id);
  }

  /** Take a model's ranges, defaults and LoRAs. */
  limit(model, limits) {
    range("steps", model.steps);
    range("guidance", model.guidance);
    $("steps").disabled = model.steps.min === model.steps.max;
    $("guidance").disabled = model.guidance.min === model.guidance.max;
    $("quick").max = Math.min(2, model.steps.max);
    $("quick").min = Math.min(2, model.steps.min);
    $("prompt").maxLength = $("negative").maxLength = limits.prompt_characters ?? 8000;
    const sides = { width: model.native_size[0], height: model.native_size[1] };
    for (const [id, native] of Object.entries(sides)) {
      Object.assign($(id), {
        min: limits.smallest_side ?? 64, max: limits.largest_side ?? 2048, step: model.multiple ?? 8, value: native,
      });
    }
    for (const id of Object.keys(TYPED)) this.#hint(id);
    this.#sliders(model.loras ?? []);
    for (const id of ["steps", "guidance", "quick"]) this.#tell(id);
  }

  #sliders(loras) {
    this.#loras.clear();
    $("loras").replaceChildren(...loras.map(({ id, name }, i) => {
      const slider = Object.assign(document.createElement("input"), {
        type: "range", min: -1, max: 1.5, step: 0.05, value: 0, id: `lora-${i}`,
      });
      const value = document.createElement("output"), label = document.createElement("label");
      const shown = document.createElement("span");
      shown.textContent = name ?? id;
      label.htmlFor = slider.id;
      label.append(shown, value);
      const tell = () => (value.textContent = Number(slider.value).toFixed(2));
      tell();
      slider.addEventListener("input", () => {
        tell();
        this.changed();
      });
      slider.addEventListener("told", tell);
      this.#loras.set(id, { name: name ?? id, slider });
      const field = document.createElement("div");
      field.append(label, slider);
      return field;
    }));
  }

  #tell(id) {
    const digits = { guidance: 1, strength: 2, control: 2 }[id] ?? 0;
    $(`${id}-value`).textContent = Number($(id).value).toFixed(digits);
  }

  /** What the form says; numbers that are typed are brought into their range. */
  read() {
    const settings = {
      prompt: $("prompt").value,
      seed: this.#seed(),
      steps: Number($("steps").value),
      guidance_scale: Number($("guidance").value),
      strength: Number($("strength").value),
      control_scale: Number($("control").value),
      width: this.#side("width"),
      height: this.#side("height"),
      loras: [...this.#loras].map(([id, { slider }]) => ({ id, weight: Number(slider.value) }))
        .filter(({ weight }) => weight !== 0),
    };
    const negative = $("negative").value.trim();
    return negative ? { ...settings, negative_prompt: negative } : settings;
  }

  #side(id) {
    const { min, max, step } = $(id);
    const near = Math.round(Number($(id).value) / step) * step;
    return Math.min(Number(max), Math.max(Number(min), near || Number(min)));
  }

  #seed() {
    const text = $("seed").value.trim();
    return isSeed(text) ? String(BigInt(text)) : "0";
  }

  /** Show another seed. */
  reseed() {
    $("seed").value = anySeed();
    this.#hint("seed");
  }

  /** Say beside a field what its text `becomes`, if that is something else; answers what it says. */
  #hint(id, becomes = "became") {
    const typed = $(id).value.trim(), given = id === "seed" ? this.#seed() : String(this.#side(id));
    const isTaken = id === "seed" ? isSeed(typed) : typed !== "" && Number(typed) === Number(given);
    const { min, max, step } = $(id);
    const rule = id === "seed" ? "a whole number below 2⁶⁴" : `from ${min} to ${max} in steps of ${step}`;
    const shown = typed.slice(0, 20);
    const text = isTaken ? "" : `${TYPED[id]}${shown && ` ${shown}`} ${becomes} ${given}: it is ${rule}`;
    $(id).setAttribute("aria-invalid", String(!isTaken));
    $(`${id}-hint`).textContent = text;
    return text;
  }

  /** Show what a field's text is sent as. */
  #accept(id) {
    $(id).value = id === "seed" ? this.#seed() : this.#side(id);
    $(id).setAttribute("aria-invalid", "false");
  }

  /** Steps at once, while one types. */
  get quick() {
    return Math.min(Number($("quick").value), Number($("steps").value));
  }

  /** Show settings; answers what could not be taken as it was, in words. */
  write(settings) {
    const notes = [];
    const text = (value) => String(value ?? "").slice(0, $("prompt").maxLength > 0 ? $("prompt").maxLength : 8000);
    if (settings.prompt !== undefined) $("prompt").value = text(settings.prompt);
    $("negative").value = text(settings.negative_prompt);
    const sliders = { steps: "steps", guidance_scale: "guidance", strength: "strength", control_scale: "control" };
    for (const [name, id] of Object.entries(sliders)) {
      const wanted = settings[name];
      if (!Number.isFinite(wanted)) continue;
      $(id).value = wanted;
      const given = Number($(id).value);
      if (Math.abs(given - wanted) > 0.051) {
        notes.push(`${id} ${wanted} became ${given}: this model takes ${span($(id))}`);
      }
      this.#tell(id);
    }
    for (const id of Object.keys(TYPED)) {
      if (settings[id] !== undefined) $(id).value = String(settings[id]);
      const hint = this.#hint(id);
      this.#accept(id);
      if (hint) notes.push(hint[0].toLowerCase() + hint.slice(1));
    }
    return [...notes, ...this.#weigh(settings.loras ?? [])];
  }

  /** Set the sliders to [{id, weight}], by ids or names; answers as `write`. */
  #weigh(loras) {
    const notes = [];
    for (const { slider } of this.#loras.values()) slider.value = 0;
    for (const { id, weight } of loras) {
      const slider = this.#slider(String(id)), name = String(id).slice(0, 64);
      if (slider) slider.value = weight;
      if (!slider) notes.push(`the LoRA ${name} is not loaded here`);
      else if (Math.abs(slider.value - weight) > 1e-6) {
        notes.push(`the LoRA ${name} of ${weight} became ${slider.value}: its slider takes ${span(slider)} in steps of ${slider.step}`);
      }
    }
    for (const { slider } of this.#loras.values()) slider.dispatchEvent(new Event("told"));
    return notes;
  }

  /** The slider of an id or a name, in capitals or not. */
  #slider(id) {
    const all = [...this.#loras].map(([key, one]) => ({ ...one, key }));
    const same = (a, b) => a.toLowerCase() === b.toLowerCase();
    return (this.#loras.get(id) ?? all.find(({ name }) => name === id)
      ?? all.find(({ key, name }) => same(key, id) || same(name, id)))?.slider;
  }
}

const span = ({ min, max }) => (min === max ? min : `${min} to ${max}`);

function range(id, { min, max, default: usual }) {
  Object.assign($(id), { min, max });
  $(id).value = usual;
  $(`${id}-range`).textContent = min === max
    ? `this model takes ${min}`
    : `this model takes ${min} to ${max}, usually ${usual}`;
}
