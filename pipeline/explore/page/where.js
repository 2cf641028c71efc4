/** A SQL condition as clauses between ANDs: some say what the filters show, the rest stays as it was written. */

const NUMBER = "[-+]?(?:\\d+\\.?\\d*|\\.\\d+)(?:e[-+]?\\d+)?";
const COMPARED = new RegExp(`^(>=|<=|>|<|=)\\s*(${NUMBER})$`, "i");
const BETWEEN = new RegExp(`^BETWEEN\\s+(${NUMBER})\\s+AND\\s+(${NUMBER})$`, "i");
const VALUE = `'(?:[^']|'')*'|${NUMBER}|true|false`;
const TOKEN = /'(?:[^']|'')*'|"(?:[^"]|"")*"|--|\/\*|[A-Za-z_]\w*|[()[\]{}]|[^]/g;

/** Cut a condition at the ANDs of its outermost level; null if it cannot be cut. */
function split(sql) {
  const clauses = [];
  let [depth, between, start] = [0, 0, 0];
  for (const match of sql.matchAll(TOKEN)) {
    const word = match[0].toUpperCase();
    if (word === "--" || word === "/*") return null;
    if ("([{".includes(word) || word === "CASE") depth += 1;
    else if (")]}".includes(word) || word === "END") depth -= 1;
    if (depth < 0) return null;
    if (depth || word.length < 2) continue;
    if (["OR", "QUALIFY", "LIMIT", "ORDER", "GROUP", "UNION"].includes(word)) return null;
    if (word === "BETWEEN") between += 1;
    if (word === "AND" && between) between -= 1;
    else if (word === "AND") {
      clauses.push(sql.slice(start, match.index));
      start = match.index + 3;
    }
  }
  if (depth) return null;
  return [...clauses, sql.slice(start)].map((clause) => clause.trim());
}

const literal = (value) => (typeof value === "string" ? `'${value.replaceAll("'", "''")}'` : String(value));

function unliteral(text) {
  if (text.startsWith("'")) return text.slice(1, -1).replaceAll("''", "'");
  return /^(true|false)$/i.test(text) ? text.toLowerCase() === "true" : Number(text);
}

/** The rest of a clause that begins with a column's name, or null. */
function after(clause, name) {
  if (clause.slice(0, name.length).toLowerCase() !== name.toLowerCase()) return null;
  const rest = clause.slice(name.length);
  return /^\w/.test(rest) ? null : rest.trim();
}

function filterOf(clause, name, kind) {
  const alternative = clause.match(/^\((.*) OR (.*) IS NULL\)$/is);
  if (alternative && alternative[2].toLowerCase() === name.toLowerCase()) {
    const first = filterOf(alternative[1], name, kind);
    return first?.values ? { ...first, empty: true } : null;
  }
  if (kind === "flag" && after(clause, "NOT") === name) return { values: [false] };
  const rest = after(clause, name);
  if (rest === null) return null;
  if (kind === "flag" && rest === "") return { values: [true] };
  if (/^IS\s+NULL$/i.test(rest)) return { values: [], empty: true };
  if (kind === "number") {
    const between = rest.match(BETWEEN);
    if (between) return { low: Number(between[1]), high: Number(between[2]), closed: true };
    const [, sign, value] = rest.match(COMPARED) ?? [];
    if (sign === ">=") return { low: Number(value) };
    if (sign === "<") return { high: Number(value) };
    if (sign === "<=") return { high: Number(value), closed: true };
    return sign === "=" ? { low: Number(value), high: Number(value), closed: true } : null;
  }
  const listed = rest.match(new RegExp(`^(?:=\\s*(${VALUE})|IN\\s*\\((\\s*(?:${VALUE})(?:\\s*,\\s*(?:${VALUE}))*\\s*)\\))$`, "i"));
  return listed ? { values: (listed[1] ?? listed[2]).match(new RegExp(VALUE, "gi")).map(unliteral) } : null;
}

/** Write a filter of a column as SQL. */
export function clauseOf(name, filter) {
  if (filter.values) {
    const { values, empty } = filter;
    if (!values.length) return `${name} IS NULL`;
    const listed = values.length === 1 ? `${name} = ${literal(values[0])}` : `${name} IN (${values.map(literal).join(", ")})`;
    return empty ? `(${listed} OR ${name} IS NULL)` : listed;
  }
  const { low, high, closed } = filter;
  if (low === undefined) return `${name} ${closed ? "<=" : "<"} ${high}`;
  if (high === undefined) return `${name} >= ${low}`;
  return closed ? `${name} BETWEEN ${low} AND ${high}` : `${name} >= ${low} AND ${name} < ${high}`;
}

export class Where {
  constructor(sql, columns) {
    this.columns = columns;
    const whole = sql.trim();
    const clauses = split(whole);
    this.clauses = whole ? (clauses ?? [whole]).map((text) => this.read(text)) : [];
    if (!clauses && whole) this.clauses[0].loose = true;
  }

  read(text) {
    for (const { name, kind } of this.columns) {
      const filter = kind === "text" ? null : filterOf(text, name, kind);
      if (filter) return { text, name, filter };
    }
    return { text };
  }

  /** The filter of a column: what its clauses say together. */
  filter(name) {
    const own = this.clauses.filter((clause) => clause.name === name);
    return own.length ? Object.assign({}, ...own.map((clause) => clause.filter)) : null;
  }

  /** The SQL without the clauses of a column, or with a new one in their position. */
  with(name, filter) {
    const position = this.clauses.findIndex((clause) => clause.name === name);
    const rest = this.clauses.filter((clause) => clause.name !== name);
    if (filter) rest.splice(position < 0 ? rest.length : position, 0, { text: clauseOf(name, filter) });
    return this.join(rest);
  }

  join(clauses) {
    return clauses.map(({ text, loose }) => (loose && clauses.length > 1 ? `(${text})` : text)).join(" AND ");
  }

  /** The words that the condition looks for in texts. */
  words() {
    const found = this.clauses.flatMap(({ text }) => [...text.matchAll(/I?LIKE\s+'%((?:[^'%]|'')*)%'/gi)]);
    return [...new Set(found.map((match) => match[1].replaceAll("''", "'").replace(/\\([%_\\])/g, "$1")))];
  }

  /** The SQL with this word looked for in all captions; an empty word takes the search away. */
  withWord(word) {
    const texts = this.columns.filter(({ kind, name }) => kind === "text" && /^caption/.test(name));
    const written = texts.filter(({ group }) => /^captions/.test(group));
    const names = (written.length ? written : texts).map(({ name }) => name);
    const one = `(?:${names.map((name) => name.replace(/\W/g, "\\$&")).join("|")}) ILIKE '%(?:[^']|'')*%'`;
    const search = new RegExp(`^\\(?${one}(?: OR ${one})*\\)?$`);
    const rest = this.clauses.filter(({ text }) => !names.length || !search.test(text));
    const text = names.map((name) => `${name} ILIKE ${literal(`%${word}%`)}`).join(" OR ");
    if (word && names.length) rest.push({ text: names.length > 1 ? `(${text})` : text });
    return this.join(rest);
  }
}
