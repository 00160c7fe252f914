// A table whose cells are patched in place: text, or {text, kind, href, icon, note, tip, act, off}, or a list of these.
export default {
  template: `
    <div class="table"><table>
      <thead><tr><th v-for="c in columns" :class="c.kind">{{ c.label }}</th></tr></thead>
      <tbody><tr v-for="row in rows" :key="row.id"><td v-for="c in columns" :class="c.kind">
        <template v-for="cell in cells(row[c.name])">
          <button v-if="cell.act" type="button" :disabled="!!cell.off" @click="$emit('act', row.id)">{{ cell.text }}
            <q-tooltip v-if="cell.off">{{ cell.off }}</q-tooltip></button>
          <component v-else :is="cell.href ? 'a' : 'span'" :href="cell.href" :class="cell.kind">
            <i v-if="cell.icon" :class="cell.icon"></i>{{ cell.text }}<em v-if="cell.note">{{ cell.note }}</em>
            <q-tooltip v-if="cell.tip">{{ cell.tip }}</q-tooltip></component>
        </template></td></tr></tbody>
    </table></div>`,
  props: { columns: Array, rows: Array },
  methods: {
    cells(value) {
      return [value ?? ""].flat().map((cell) => (typeof cell === "object" ? cell : { text: cell }));
    },
  },
};
