// The pictures that go with the next message: chosen, pasted or dropped, shown small, and told what can't be sent.
"use strict";

const TYPES = ["image/jpeg", "image/png", "image/webp", "image/bmp"]; // sent as they are, if they are small
const MAX_FILE_BYTES = 32 << 20;
const MAX_BODY_BYTES = 4 << 20; // of a whole request: the server refuses a longer one
const SMALL_BYTES = 256 << 10; // a larger picture is made smaller, which the model does too
const LONGEST_SIDE = 1024;
const TEXT_TOKENS = 64; // of the context that pictures leave to a short question and its answer

class Images {
  // tell: what is called with a text for the user. used: gives the data URLs of the conversation so far.
  constructor(tell, used) {
    this.tell = tell;
    this.used = used;
    this.chosen = []; // {name, url, note}
    this.most = 0; // pictures that fit the context; 0: the model takes none
  }

  // What the chosen model takes: an entry of /v1/models.
  setModel(entry) {
    const tokens = (entry && entry.input_modalities.includes("image") && entry.image_tokens) || 0;
    this.most = tokens ? Math.max(1, Math.floor((entry.max_model_len - TEXT_TOKENS) / tokens)) : 0;
    at("add-images").hidden = !this.most;
    if (!this.most) this.chosen = [];
    this.draw();
  }

  // Takes files, one after the other, and says why of each that it doesn't take.
  async add(files) {
    if (!this.most) return this.tell("This model takes no images");
    const refused = [];
    for (const file of files) {
      const picture = await readPicture(file).catch((error) => ({ wrong: error.message }));
      const wrong = picture.wrong || this.refusal(picture);
      if (wrong) refused.push(`${file.name || "The image"}: ${wrong}`);
      else this.chosen.push(picture);
    }
    this.draw();
    if (refused.length) this.tell(refused.join("; "));
  }

  // Why a further picture can't be sent; "": it can.
  refusal(picture) {
    const urls = [...this.used(), ...this.chosen.map((each) => each.url)];
    if (urls.length >= this.most) return `at most ${this.most} images fit this model's context, earlier ones included`;
    if (lengthOf([...urls, picture.url]) > (MAX_BODY_BYTES * 7) / 8) { // the rest is the conversation's text
      return "the images of a conversation are at most 3.5 MiB together; begin a new one";
    }
    return "";
  }

  remove(picture) {
    this.chosen = this.chosen.filter((each) => each !== picture);
    this.draw();
    (document.querySelector("#images button") || at("message")).focus();
  }

  // The chosen ones, which are then no longer chosen.
  take() {
    const taken = this.chosen;
    this.restore([]);
    return taken;
  }

  // Chooses these again.
  restore(pictures) {
    this.chosen = pictures;
    this.draw();
  }

  draw() {
    at("images").replaceChildren(
      ...this.chosen.map((picture) => {
        const item = document.createElement("li");
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "Remove";
        remove.setAttribute("aria-label", `Remove ${picture.name}`);
        remove.addEventListener("click", () => this.remove(picture));
        item.append(thumbnail(picture), remove);
        return item;
      }),
    );
    at("images").hidden = at("images-note").hidden = !this.chosen.length;
    const urls = [...this.used(), ...this.chosen.map((each) => each.url)];
    const size = (lengthOf(urls) / (1 << 20)).toFixed(1);
    at("images-note").textContent = `${urls.length} of at most ${this.most} images in the conversation, ${size} of 3.5 MiB`;
  }
}

function thumbnail(picture) {
  const image = document.createElement("img");
  image.src = picture.url;
  image.alt = picture.name;
  image.title = `${picture.name}${picture.note}`;
  return image;
}

function lengthOf(urls) {
  return urls.reduce((sum, url) => sum + url.length, 0);
}

// A file as what is sent of it: as it is, or made smaller, which leaves its EXIF data out too.
async function readPicture(file) {
  const name = file.name || "Image";
  if (!file.type.startsWith("image/")) throw new Error("isn't an image");
  if (file.size > MAX_FILE_BYTES) throw new Error("is larger than 32 MiB");
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright
  } catch {
    throw new Error("can't be read as an image: JPEG, PNG, WebP, GIF and BMP can");
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  try {
    if (scale === 1 && file.size <= SMALL_BYTES && TYPES.includes(file.type)) {
      return { name, url: await dataUrl(file), note: `, ${width} x ${height}` };
    }
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const note = `, ${width} x ${height}, sent as ${canvas.width} x ${canvas.height}`;
    return { name, url: canvas.toDataURL("image/webp", 0.9), note }; // a browser that writes no WebP gives PNG
  } finally {
    bitmap.close();
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("can't be read"));
    reader.readAsDataURL(file);
  });
}

// Whether a drag or a paste brings files, rather than text.
function hasFiles(transfer) {
  return Boolean(transfer) && [...transfer.types].includes("Files");
}
