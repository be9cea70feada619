// Makes elements. Whatever comes from the server becomes text, never markup.

export const byId = (id) => document.getElementById(id);

/** An element with these properties and children. */
export function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Sets the text where it is another, so that nothing is read aloud twice. */
export function say(place, text) {
  if (place.textContent !== text) place.textContent = text;
}
