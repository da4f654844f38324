"""What guards a run, one row each: where it stands, what switches it off, and the tests that must notice.

The anchor must occur exactly once in its file (tests/fault/test_guards.py). A test named here is quick.
"""

from __future__ import annotations

from dataclasses import dataclass

STATE, LOOP = "tests/unit/train/test_checkpoint.py::test_", "tests/unit/train/test_loop_resume.py::test_"
NAN, POWER = "tests/unit/train/test_loop_nan.py::test_", "tests/fault/test_r04_power_cuts.py::test_"
DISK, DAMAGE = "tests/fault/test_r05_full_disk.py::test_", "tests/fault/test_r06_damage.py::test_"
RUN, STOP = "tests/unit/test_run_folder.py::test_", "tests/unit/test_stop.py::test_"
MAIN, CONFIG = "tests/unit/cli/test_main.py::test_", "tests/unit/test_config.py::test_"
READERS, FILES = "tests/unit/data/test_readers.py::test_", "tests/unit/test_files.py::test_"
BOX, CHAT = "tests/unit/tokenizer/test_sandbox.py::test_", "tests/unit/tokenizer/test_chat_render.py::test_"
CUT = POWER + "a_power_cut_at_any_operation_leaves_a_verified_step[30-{}]"


@dataclass(frozen=True)
class Guard:
    """One guard: its file under src/octavo, the text that makes it, that text without it, the tests that hold it."""

    name: str
    file: str
    anchor: str
    off: str
    tests: tuple[str, ...]


GUARDS = (
    # ------------------------------------------------------------------------------------------ saving
    Guard("fsync of the weights", "training/tensor_file.py",
          'failpoint("save.fsync")\n        os.fsync(descriptor)', 'failpoint("save.fsync")',
          (CUT.format("the only one is kept"),)),
    Guard("fsync of a file's bytes", "files.py",
          "write_all(descriptor, data)\n        os.fsync(descriptor)", "write_all(descriptor, data)",
          (CUT.format("the only one is kept"),)),
    Guard("fsync of the step's folder", "training/checkpoint.py",
          'failpoint("save.fsync_folder")\n    fsync_path(aside)', 'failpoint("save.fsync_folder")',
          (CUT.format("the only one is kept"),)),
    Guard("fsync of the folder of steps", "training/checkpoint.py",
          'failpoint("save.fsync_parent")\n        fsync_path(folder)', 'failpoint("save.fsync_parent")',
          (CUT.format("the only one is kept"),)),
    Guard("fsync of new folders", "files.py",
          "path.mkdir(exist_ok=True)\n    fsync_path(path.parent)", "path.mkdir(exist_ok=True)",
          (CUT.format("in new folders"),)),
    Guard("fsync of a file's new name", "files.py",
          "        raise\n    fsync_path(path.parent)", "        raise",
          (FILES + "what_is_written_is_on_disk_before_its_name_and_then_the_name",)),
    Guard("fsync at the start after a kill", "training/checkpoint.py",
          "            fsync_path(folder)\n            fsync_path(folder.parent)\n", "",
          (POWER + "a_start_after_a_kill_survives_a_power_cut[10-the only one is kept]",)),
    Guard("manifest last", "training/checkpoint.py",
          "    write_durable(aside / STATE, state_bytes)\n    files[STATE] = (len(state_bytes), "
          'hashlib.sha256(state_bytes).hexdigest())\n    failpoint("save.manifest")\n'
          "    write_durable(aside / MANIFEST, manifest.build(step, run_id, files))\n",
          "    files[STATE] = (len(state_bytes), hashlib.sha256(state_bytes).hexdigest())\n"
          "    write_durable(aside / MANIFEST, manifest.build(step, run_id, files))\n"
          "    write_durable(aside / STATE, state_bytes)\n",
          (POWER + "the_manifest_is_written_last_and_nothing_old_goes_before_the_new_is_on_disk",)),
    Guard("a step is written aside and renamed", "training/checkpoint.py",
          "        aside.mkdir()\n"
          "        _write_files(aside, step, run_id, groups, state_bytes)\n"
          '        failpoint("save.verify")\n'
          "        _require_same_bytes(aside, name)\n"
          "        if final.exists():\n"
          '            failpoint("save.replace")\n'
          '            replaced = _rename_aside(final, f"{name}.tmp-replaced")\n'
          '        failpoint("save.rename")\n'
          "        os.rename(aside, final)\n",
          "        aside = final\n"
          "        aside.mkdir(exist_ok=True)\n"
          "        _write_files(aside, step, run_id, groups, state_bytes)\n"
          "        _require_same_bytes(aside, name)\n",
          (CUT.format("the only one is kept"),)),
    Guard("a file is written aside and renamed", "files.py",
          "        write_durable(aside, data)\n        os.replace(aside, path)",
          '        os.truncate(path, 0) if path.exists() else None\n        with open(path, "wb") as file:\n'
          "            write_all(file.fileno(), data)\n            os.fsync(file.fileno())",
          (FILES + "a_failed_write_leaves_the_old_file_and_no_other",)),
    Guard("what was written is read back", "training/checkpoint.py",
          "        _require_same_bytes(aside, name)\n", "",
          (DISK + "a_disk_that_gives_other_bytes_back_loses_nothing_old[200-1]",)),
    Guard("free space is asked for first", "training/checkpoint.py",
          "if free_bytes < need_bytes:", "if False:",
          (DISK + "too_little_room_is_said_before_anything_is_written",)),
    Guard("an unfinished step is removed", "training/checkpoint.py",
          "        shutil.rmtree(aside, ignore_errors=True)\n        if replaced", "        if replaced",
          (DISK + "an_error_in_place_of_each_operation[200-1]",)),
    # ---------------------------------------------------------------------------------------- rotation
    Guard("only whole steps count as kept", "training/checkpoint.py",
          "[path for path in earlier if _looks_whole(path)][: keep - 1]", "earlier[: keep - 1]",
          (STATE + "a_step_without_all_its_files_is_not_counted_as_kept",)),
    Guard("the last good step stays", "training/checkpoint.py",
          " if len(kept) == keep - 1 else []", "",
          (STATE + "a_step_without_all_its_files_is_not_counted_as_kept",)),
    Guard("a line given up does not come back", "training/checkpoint.py",
          "    for path in later:\n        _discard(path)\n", "",
          (STATE + "rotation_keeps_the_newest_and_drops_a_line_of_training_that_was_given_up",)),
    Guard("leftovers of others are theirs", "training/checkpoint.py",
          'f"*.tmp-{run_id}"):', '"*.tmp-*"):',
          (STATE + "a_save_leaves_the_unfinished_folders_of_others",)),
    Guard("a reader clears nothing", "training/checkpoint.py",
          "    if folder.is_file():\n        refuse_foreign(folder)\n",
          "    _clear_leftovers(folder)\n",
          (STATE + "readers_change_nothing",)),
    # ----------------------------------------------------------------------------------------- reading
    Guard("hash check", "training/manifest.py",
          'problem = "" if sha256_file(os.path.join(path, found.name)) == sha256 else "sha256 differs"', 'problem = ""',
          (DAMAGE + "each_flipped_byte_is_found_and_its_file_named",)),
    Guard("hash check of the bytes that are loaded", "training/checkpoint.py",
          'if (size, sha256) != (entry["size"], entry["sha256"]):', "if False:",
          (DAMAGE + "sampled_flips_are_refused_by_loading[1000]",)),
    Guard("size check", "training/manifest.py",
          'elif status.st_size != expected["size"]:', "elif False:",
          (DAMAGE + "each_truncation_is_found_with_both_sizes[16]",)),
    Guard("extra file check", "training/manifest.py",
          'return checks + [FileCheck(name, found[name].st_size, "extra file") for name in extra]', "return checks",
          (DAMAGE + "files_that_are_missing_extra_swapped_or_not_plain_are_found",)),
    Guard("the manifest's own hash", "training/manifest.py",
          "sound = version != FORMAT or data == build(step, run_id, files)", "sound = True",
          (DAMAGE + "each_flipped_byte_is_found_and_its_file_named",)),
    Guard("a step belongs to its number", "training/manifest.py",
          "if named and int(named[1]) != step:", "if False:",
          (DAMAGE + "a_step_under_another_number_or_with_another_manifest_is_found",)),
    Guard("never start silently at step 0", "training/checkpoint.py",
          "    if not others:\n", "    if True:\n",
          (STATE + "no_valid_step_is_an_error_and_never_step_0",)),
    Guard("a passed over step is said", "training/checkpoint.py",
          "return Checkpoint(path, step, manifest.read(path)[\"run_id\"], notices,",
          "return Checkpoint(path, step, manifest.read(path)[\"run_id\"], (),",
          (STATE + "a_damaged_newest_step_is_passed_over_with_a_line_that_says_so",)),
    Guard("no pickle as a checkpoint", "training/checkpoint_path.py",
          "if file.suffix in PICKLE_SUFFIXES or _starts_like_pickle(file):", "if False:",
          (STATE + "pickles_are_never_opened",)),
    Guard("safetensors header of a checkpoint", "training/tensor_file.py",
          "if header_bytes > min(size - 8, HEADER_LIMIT_BYTES):", "if False:",
          ("tests/unit/train/test_tensor_file.py::test_a_hostile_header_is_refused_without_allocating",)),
    # ---------------------------------------------------------------------------------- going on, exactly
    Guard("RNG restore", "training/loop.py",
          '        restore_random(state["random"])\n', "",
          (LOOP + "random_numbers_drawn_beside_the_steps_go_on_too",)),
    Guard("every random generator", "training/random_state.py",
          "        random.setstate((version, tuple(words), gauss))\n", "",
          (STATE + "random_generators_go_on_where_they_were",)),
    Guard("seed per step", "training/loop.py",
          "        torch.manual_seed(step_seed(self.seed, step))\n", "",
          (NAN + "a_skipped_step_is_as_if_its_batch_had_not_been",)),
    Guard("metrics cut back at resume", "metrics_file.py",
          "            os.ftruncate(self._descriptor, keep_bytes)\n        except BaseException",
          "            pass\n        except BaseException",
          (LOOP + "what_was_logged_after_the_last_save_is_done_again_not_doubled",)),
    Guard("metrics are those of the checkpoint", "metrics_file.py",
          "if keep_bytes and (self._bytes < keep_bytes or self._digest.hexdigest() != sha256):", "if False:",
          (RUN + "a_changed_metrics_file_is_refused_untouched_and_a_lost_one_said[other]",)),
    Guard("source fingerprint", "training/loop.py",
          'if state["source"] != self.source.fingerprint or state["seed"]', 'if state["seed"]',
          (LOOP + "other_data_another_seed_or_another_model_is_refused",)),
    Guard("started_from", "training/loop.py",
          'if state.get("started_from", "") != held.started_from:', "if False:",
          ("tests/unit/test_pipeline.py::test_a_stage_that_starts_from_other_weights_begins_anew",)),
    Guard("a recipe may not change unasked", "run.py",
          "        if refused:\n            raise ConfigErrors(refused)\n", "",
          (RUN + "differences_are_listed_and_those_that_change_the_run_are_refused",)),
    Guard("duplicate-free order of an epoch", "data/permutation.py",
          "left, right = right, left ^ (mix(right ^ round_key) & mask)",
          "left, right = right, left & (mix(right ^ round_key) & mask)",
          ("tests/unit/data/test_loader.py::test_no_row_is_lost_or_doubled_in_a_pass",)),
    # ----------------------------------------------------------------------------------------- numbers
    Guard("NaN guard on the loss", "training/numeric.py",
          "if not math.isfinite(loss) or not math.isfinite(norm):", "if not math.isfinite(norm):",
          (NAN + "a_number_that_is_not_finite_stops_before_any_weight_changes[None-inf]",)),
    Guard("NaN guard on the gradient norm", "training/numeric.py",
          "if not math.isfinite(loss) or not math.isfinite(norm):", "if not math.isfinite(loss):",
          (NAN + "a_number_that_is_not_finite_stops_before_any_weight_changes[None-1.0]",)),
    Guard("NaN check of what is saved", "training/loop.py",
          "if bad := not_finite(self.optimizer.tensors()):", "if bad := []:",
          (NAN + "weights_that_are_not_finite_are_never_saved",)),
    Guard("NaN check at resume", "training/loop.py",
          "if bad := not_finite(tensors.items()):", "if bad := []:",
          (NAN + "a_checkpoint_with_numbers_that_are_not_finite_is_refused",)),
    Guard("skips have an end", "training/numeric.py",
          "many = len(self.refused) > self.config.max_skips", "many = False",
          (NAN + "more_skips_than_allowed_stop_the_run_also_across_a_resume[bad1]",)),
    # ------------------------------------------------------------------------------ one owner, and stopping
    Guard("lock", "run.py",
          "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          (RUN + "the_lock_is_free_after_an_error_and_two_in_one_process_are_refused",)),
    Guard("a worker does not keep the lock", "run.py",
          "os.register_at_fork(after_in_child=_forget_locks)", "pass",
          (RUN + "a_surviving_worker_does_not_keep_the_lock_of_a_killed_owner",)),
    Guard("stop polled in the loop", "training/loop.py",
          "            held.stop.check()\n            self.figures", "            self.figures",
          (LOOP + "a_stop_before_the_first_step_is_saved_too",)),
    Guard("stop polled in validation", "training/loop.py",
          "                    self.held.stop.check()\n                    total", "                    total",
          (LOOP + "a_stop_breaks_off_a_validation_which_is_done_again",)),
    Guard("a step that takes too long is given up", "training/loop.py",
          "            if self.held.stop.overdue:\n                self.held.stop.check()\n", "",
          (LOOP + "a_step_that_takes_too_long_is_given_up",)),
    Guard("second Ctrl-C", "stop.py",
          "os._exit(EXIT_AT_ONCE)", "return",
          (STOP + "first_and_second_signal_of_a_process[deaf-signals2-130]",)),
    Guard("second Ctrl-C inside a long call", "stop.py",
          "                self._watcher = _Watcher()\n", "                pass\n",
          (STOP + "first_and_second_signal_of_a_process[inside-signals4-130]",)),
    Guard("a stop is exit code 75", "errors.py",
          "exit_code = 75", "exit_code = 1",
          ("tests/unit/test_errors.py::test_exit_codes[StopRequested-STOPPED-75]",)),
    Guard("each refusal has its exit code", "cli/main.py",
          "    return error.exit_code\n", "    return 1\n",
          (MAIN + "our_refusals_print_one_line_and_their_exit_code",)),
    Guard("three failed saves stop a run", "training/loop.py",
          "if last or self.failed_saves >= MAX_FAILED_SAVES or", "if last or",
          (LOOP + "three_failed_saves_in_a_row_stop_the_run_and_it_resumes",)),
    Guard("memory is asked for first", "training/memory.py",
          "    if memory.total <= REFUSED_ABOVE * room:\n", "    if True:\n",
          ("tests/unit/train/test_memory.py::test_what_cannot_fit_is_refused_with_two_settings_that_make_it_fit",)),
    # ------------------------------------------------------------------------------------ what strangers write
    Guard("size cap of a JSONL row", "data/readers.py",
          "in lines(file, MAX_ROW_BYTES):", "in lines(file, 1 << 40):",
          (READERS + "a_huge_row_is_passed_over_without_being_held",)),
    Guard("the place of a byte that is not UTF-8", "data/readers.py",
          "bytes(error.object), column + error.start + 1", "bytes(error.object), column + 1",
          (READERS + "encoding_errors_have_a_place_and_a_policy",)),
    Guard("NUL and lone surrogates", "data/readers.py",
          'if (at := text.find("\\0")) >= 0:', "if False:",
          (READERS + "what_is_wrong_with_a_row",)),
    Guard("a shard has the bytes that were written", "data/shards.py",
          'if verify and sha256_file(path) != file["sha256"]:', "if False:",
          ("tests/unit/data/test_prepare.py::test_damaged_shards_are_refused_by_name",)),
    Guard("template attributes", "tokenizer/sandbox.py",
          "if not super().is_safe_attribute(obj, attr, value):", "if False:",
          (BOX + "what_leads_out_is_not_even_done",)),
    Guard("template steps", "tokenizer/budget.py",
          "        if self.steps < 0:\n", "        if False:\n",
          (BOX + "bombs_are_refused_soon_and_small[9]",)),
    Guard("template characters", "tokenizer/budget.py",
          "        if self.chars < 0:\n", "        if False:\n",
          (BOX + "bombs_are_refused_soon_and_small[4]",)),
    Guard("special tokens in a user's text", "tokenizer/chat.py",
          "if not any(char in leaf for leaf in _leaves(data) for char in signs):", "if True:",
          (CHAT + "special_text_in_messages_stays_text",)),
    Guard("special tokens in encoded text", "tokenizer/core.py",
          "        if parse_special:\n", "        if True:\n",
          ("tests/unit/tokenizer/test_tokenizer_round_trip.py::test_special_text_is_plain_unless_parsed",)),
    Guard("safetensors header of a model", "hub/limits.py",
          "if length > min(size, MAX_HEADER_BYTES):", "if False:",
          ("tests/unit/hub/test_family.py::test_a_header_longer_than_any_models_is_refused_before_it_is_read",)),
    Guard("weights_only", "hub/pickled.py",
          "weights_only=True, mmap=True", "weights_only=False, mmap=True",
          ("tests/unit/hub/test_pickled.py::test_a_pickle_that_would_run_something_runs_nothing",)),
    Guard("limits of the process that unpickles", "hub/pickled.py",
          "        resource.setrlimit(limit, (value, value))\n", "        pass\n",
          ("tests/unit/hub/test_pickled.py::test_the_child_may_not_grow_or_run_on",)),
    Guard("an index stays inside its folder", "hub/folder.py",
          "if outside := [name for name in files if not isinstance(name, str) or Path(name).name != name]:",
          "if outside := []:",
          ("tests/unit/hub/test_family.py::test_an_index_must_stay_inside_its_folder_and_agree_with_its_shards",)),
    Guard("no code named by a model", "schema.py",
          "if _no_imports.get() and module not in sys.modules and", "if False and",
          ("tests/unit/hub/test_damaged_config.py::test_code_that_a_config_names_does_not_run",)),
    Guard("a pulled file is what the hub states", "hub/pull.py",
          "            if wrong := file.differs(path):\n", '            if wrong := "":\n',
          ("tests/unit/hub/test_pull.py::test_content_that_is_not_what_the_hub_states",)),
    Guard("unknown key of a recipe", "schema.py",
          'frozen=True, extra="forbid"', 'frozen=True, extra="ignore"',
          (CONFIG + "a_misspelt_key_anywhere_is_found_and_the_right_one_suggested",)),
    Guard("YAML that grows without end", "config.py",
          "if len(found) > MAX_ENTRIES or len(path) > MAX_DEPTH:", "if False:",
          (CONFIG + "yaml_that_means_harm_is_refused_in_one_line",)),
)  # fmt: skip
