"""What ``make test`` leaves to ``make test-all``: what takes long, or repeats an assertion in another combination."""

MORE = [  # patterns in a test's name
    r"test_launch.py::test_the_trainer_learns.*(FSDP2|DeepSpeed)",  # the same on other launchers
    r"test_launch.py::test_what_the_trainer_saves.*\[DDP\]",
    r"test_parallelism.py::test_eight_ranks",
    r"test_parallelism.py::test_checkpoints.*(replicate x tp|experts in a tensor)",
    r"test_first_examples.py::.*train_(accelerate|fsdp2|plain)",
    r"test_gpu_plan.py::",  # all parts of make gpu on the CPU
    r"test_deepspeed_parallelism.py::test_ulysses.*(mesh-2|json-3|mpu-1)",
    r"test_deepspeed_parallelism.py::test_nothing_of_.*\[0\]",
    r"test_deepspeed_parallelism.py::test_autotp.*\[[12]-",
    r"test_deepspeed_parallelism.py::test_what_autotp.*\[[03]\]",
    r"test_deepspeed_parallelism.py::test_hpz.*None",
    r"test_deepspeed_parallelism.py::test_replicas_of_four",
    r"test_deepspeed_parallelism.py::.*(llama|shares_sequences)",
    r"test_deepspeed_layout.py::test_replicas_start.*(zero 3-3|fsdp|ddp|zero 1)",
    r"test_deepspeed_layout.py::test_what_is_exported.*\[[12]\]",
    r"test_native.py::test_address_and_undefined_behaviour",  # compiles the kernels once more
    r"test_build.py::test_a_toolkit_that_does_not_fit",
    r"test_checkpoint.py::test_a_rank_killed_inside_a_save",  # a lone process is killed at thirty moments
    r"test_checkpoint.py::test_an_exact_resume_changes_no_bit\[.*-[45]\]",  # a resume at other moments
    r"test_checkpoint.py::test_an_average_loads_in_other.*(zero 1|zero 2|hsdp)",
    r"test_elastic.py::.*accelerate",
    r"test_adaptive.py::test_an_exact_resume.*(plain|ddp|hsdp|zero [012])",
    r"test_adaptive.py::test_in_other_orders_too.*(ddp|hsdp)",
    r"test_configs.py::test_a_shipped_config_trains_under_deepspeed\[.*-[03]\]",  # stage 2 is every config's
    # a rule is the same in every stage and under every wrapper: each has one of the hardest, and Adam has all
    r"test_deepspeed.py::test_every_stage_trains_as_the_oracle\[(des-loc-sgdm|mt-dao-adopt-qh)-[012]\]",
    r"test_deepspeed.py::test_every_stage_trains_as_the_oracle\[mt-dao-adam-n2-[01]\]",
    r"test_deepspeed.py::test_(after_update|a_synchronous_warm_up)_trains_as_the_oracle\[1\]",  # stage 1 is half of 2
    r"test_deepspeed.py::test_(overlap|cpu_offload)_changes_no_bit\[1\]",
    r"test_deepspeed.py::test_(bytes_are|nothing_crosses|fp16_overflow).*\[1\]",
    r"test_deepspeed.py::test_outer_nesterov.*outer lr 1",
    r"test_deepspeed_use.py::test_an_optimizer_made_by_the_script.*\[[02]-callable\]",
    r"test_deepspeed_use.py::test_the_exported_model.*\[(fp32|bf16)-1\]",
    r"test_torch.py::test_every_framework.*\[des-loc-sgdm-(ddp|fsdp|hsdp)",
    r"test_torch.py::test_every_framework.*\[(mt-dao-adam-n2-(plain|hsdp)|mt-dao-adopt-qh-(ddp|hsdp))",
    r"test_torch_use.py::test_variants_of_fsdp.*-hsdp\]",
    r"test_torch_use.py::test_options_of_ddp.*\[5-\{'find",
    r"test_muon_everywhere.py::test_every_framework.*\[(hsdp inside|zero 1)\]",
    r"test_deepspeed_use.py::test_resume_in_the_middle.*\[(6-|5-1)",
    r"test_switch_everywhere.py::test_every_framework.*\[(plain-|zero [013]-|ddp-later|fsdp-at|zero 2-at)",
    r"test_switch_everywhere.py::test_an_exact_resume.*\[zero 2-",
    r"test_stock.py::test_a_deepspeed_resume_in_the_middle.*\[[12]\]",
    r"test_sinks.py::test_deepspeeds_monitor_gets_one_row.*\[(0-DesLoc|1-DesLoc)\]",
    r"test_one_rank_alone.py::.*plain-True-",  # averages that do not overlap
    r"test_sequences.py::test_any_sequence_on_all_ranks.*\[(plain-True|ddp-False)\]",
    r"test_save_that_fails.py::test_every_rank_hears_at_once.*\[(ddp|hsdp|zero 1)\]",
    r"test_forward_weights.py::test_a_roll_back.*\[(zero-0|zero-1|zero-2|zero-3 bf16|zero-3 fp16)\]",
    r"test_state_dict_in_savers.py::test_averaged_gives_whole_weights_of_an_engine\[[02]\]",
    r"test_said_once.py::test_a_command_that_cannot",
    r"test_said_once.py::test_a_script_that_run_started_without",
    r"test_installed.py::test_the_commands_of_the_readme",  # installs into an environment of its own, and so do extras
    r"test_installed.py::test_an_extra_brings.*\[(accelerate|transformers)\]",
    r"test_telemetry_files.py::test_a_preempted_job_closes.*\[raises\]",
    r"test_versions.py::test_an_older_framework.*\[transformers\]",
    r"test_versions.py::test_kernels_for_another_torch",
]
